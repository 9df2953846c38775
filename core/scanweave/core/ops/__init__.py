"""The primitives: pure functions on channel-last tensors, registered as torch operators."""
