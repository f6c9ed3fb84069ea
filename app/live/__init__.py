"""A live model behind the dashboard: one owner, jobs with progress and cancel.

owner     the thread that owns the model, and its jobs
watch     progress and cancelling of a forward pass
change    what the form says, as an intervention
capture   a prompt becomes a run
compare   what the model writes with its heads changed, beside what it writes without
"""

from __future__ import annotations
