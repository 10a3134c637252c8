"""One open store without a user surface: memtable, versions, commits, checkpoints, recovery."""
