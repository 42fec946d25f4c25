"""Run folders: how their files are written and verified, their checkpoints, and what of a stranger's is trusted."""
