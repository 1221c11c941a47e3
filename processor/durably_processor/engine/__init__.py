"""What a run does, as a pure function of its inputs: no Kafka, no RocksDB, no clock, no logging."""
