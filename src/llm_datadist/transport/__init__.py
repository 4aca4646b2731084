"""Transports: the ways in which bytes get from one process to another."""
