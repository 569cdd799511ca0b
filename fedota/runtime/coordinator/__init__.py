"""The coordinator: one for each problem; it runs round after round and reports each change."""
