"""What is told of durably's processes while they work: metrics, traces, logs, and whether they live and are ready."""
