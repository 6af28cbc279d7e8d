"""Emulators of S3 and GCS on 127.0.0.1; a test that needs one is skipped where it is not installed."""

import os
import uuid
from contextlib import contextmanager

import pytest


@contextmanager
def emulated_s3():
    """Serves S3; yields the environment of its clients and the URL of an empty bucket."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    bucket = f"bucket-{uuid.uuid4().hex}"  # all servers of a process have the same buckets
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    try:
        yield environment, f"s3://{bucket}"
    finally:
        running.stop()


@contextmanager
def emulated_gcs():
    """Serves GCS; yields the environment of its clients and the URL of an empty bucket."""
    server = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    running.start()
    port = running._api._httpd.socket.getsockname()[1]
    try:
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}, "gs://bucket"
    finally:
        running.stop()
