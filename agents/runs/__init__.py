"""What of a stranger's run folder is trusted."""
