"""KV bytes from worker to worker; see ``base.py`` for the seam and ``service.py`` for what a worker starts."""
