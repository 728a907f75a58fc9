"""The scripts that people read and start; what they share is in `visionpos.training`."""
