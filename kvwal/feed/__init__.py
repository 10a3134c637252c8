"""What a store's commits changed, in their order: the change feed, and the snapshot that one begins from."""
