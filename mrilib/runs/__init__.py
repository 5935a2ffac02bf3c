"""Run folders: records, notebooks under papermill, sweeps."""
