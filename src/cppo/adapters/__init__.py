"""Adapters into the frameworks people train with, one module a framework; each imports only its own guest."""
