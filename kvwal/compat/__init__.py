"""The interfaces of other mappings on disk, over a kvwal store: `dbm` and `shelve` of the standard library."""
