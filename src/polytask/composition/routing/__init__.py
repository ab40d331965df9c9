"""Routers: weights over adapters from an input. One file each."""
