"""A store in memory whose operations can be watched and failed, and a run's folder that grows by events."""

import json
import shutil
import threading

import fsspec

URL = "s3://bucket/run"
CHANGES = ("pipe_file", "put_file", "rm_file")


class Killed(BaseException):
    """The process ended here."""


class FakeFilesystem:
    """fsspec's file system in memory; `before` is called with the name and the path of every operation."""

    def __init__(self):
        self.memory = fsspec.filesystem("memory", skip_instance_cache=True)
        self.memory.store.clear()
        self.memory.pseudo_dirs[:] = ["", "/bucket"]
        self.log, self.before, self.lock = [], lambda name, path: None, threading.Lock()

    def __getattr__(self, name):
        method = getattr(self.memory, name)

        def call(*args, **options):
            path = args[name == "put_file"] if args else ""
            with self.lock:
                self.log.append((name, path.removeprefix("bucket/run/")))
                self.before(name, path)
            return method(*args, **options)

        return call

    def names(self):
        """The objects below the URL."""
        return {path.removeprefix("/bucket/run/") for path in self.memory.store}

    def text(self, name):
        return self.memory.store[f"/bucket/run/{name}"].getvalue().decode()


def write(path, text):
    """Writes a file as a run does: complete as soon as it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def checkpoint(folder, step):
    """Writes a step as Orbax does, then removes those before the newest two."""
    steps = folder / "checkpoints"
    temporary = steps / f"{step}.orbax-checkpoint-tmp-1"
    for name in ("state/d/a", "state/d/b", "record/metadata"):
        write(temporary / name, f"{name} of step {step}\n")
    yield
    temporary.replace(steps / str(step))
    yield
    for old in sorted(int(each.name) for each in steps.iterdir() if each.name.isdigit())[:-2]:
        for part in sorted((steps / str(old)).rglob("*")):
            if part.is_file():
                part.unlink()
                yield
        shutil.rmtree(steps / str(old))


def run_of(folder, steps=4, first=0):
    """The life of a run in its folder, one event at a time, with nothing between two events."""
    write(folder / "config.json", "{}")
    yield
    if first == 0:
        write(folder / "answers_before.jsonl", "{}\n")
        yield
        write(folder / "eval_before.json", "{}")
        yield
    write(folder / "metrics.jsonl", "".join(f'{{"step": {step}}}\n' for step in range(first)))
    for step in range(first, steps):
        write(folder / "samples" / f"{step:06d}.txt", f"page {step}")
        yield
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        yield
        yield from checkpoint(folder, step + 1)
        yield
    for name in ("adapter/vector.bin", "adapter/adapter.json", "answers_after.jsonl", "summary.json"):
        write(folder / name, f"{name}\n")
        yield
