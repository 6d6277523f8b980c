"""What `simcore.lower` builds programs of."""
