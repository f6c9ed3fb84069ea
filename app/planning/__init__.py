"""Plans in the dashboard: which methods a run can serve, the plan of a form, and its export as an archive.

methods   planners, and what a run lacks for each
make      the plan of a form, kept for a while
archive   an export as a zip, with its loss report
"""

from __future__ import annotations
