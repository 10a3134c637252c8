"""What a program reads and writes through: mappings, snapshots, transactions."""
