"""The HTML document around the application.

The colour scheme is set before anything is drawn, from the choice kept in the browser or from the system, and copied to a cookie so
that the server draws its figures in the same scheme.
"""

from __future__ import annotations

from headscope.app.theme import COOKIE

INDEX = (
    """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{%title%}</title>
<script>
(function () {
  var kept = null;
  try { kept = localStorage.getItem("mantine-color-scheme-value"); } catch (error) { kept = null; }
  var dark = kept === "dark" || (kept !== "light" && window.matchMedia("(prefers-color-scheme: dark)").matches);
  var scheme = dark ? "dark" : "light";
  document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
  document.cookie = "COOKIE=" + scheme + "; path=/; SameSite=Lax";
})();
</script>
{%favicon%}
{%css%}
</head>
<body>
{%app_entry%}
<footer>
{%config%}
{%scripts%}
{%renderer%}
</footer>
</body>
</html>
"""
).replace("COOKIE", COOKIE)
