"""Drawing: what a run, a sweep, a comparison and a landscape look like."""
