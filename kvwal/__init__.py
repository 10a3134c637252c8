"""kvwal: an embedded, ordered, transactional key-value store that survives power loss."""
