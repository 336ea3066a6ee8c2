"""The protocol, and the engines behind it."""
