"""What `accelerate launch --config_file` is told: how a run is spread over processes."""
