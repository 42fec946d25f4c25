"""Run folders as they lie on the disk: how their files are written and verified, and their checkpoints."""
