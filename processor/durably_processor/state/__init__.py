"""What a partition keeps on disk: a cache of the events topic."""
