/* The plan page's address, and clicks on its grid. */
(function () {
  "use strict";

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    headscope_plan: {
      url: function (method, bound, share, length, format) {
        var query = new URLSearchParams();
        var given = { method: method, bound: bound, share: share, length: length, format: format };
        Object.keys(given).forEach(function (key) { if (given[key] !== null && given[key] !== undefined && given[key] !== "") query.set(key, given[key]); });
        var text = query.toString();
        window.history.replaceState(window.history.state, "", window.location.pathname + (text ? "?" + text : ""));
        return text;
      },

      open_head: function (click, run, kept) {
        if (!click || !click.points || !click.points.length) return window.dash_clientside.no_update;
        var point = click.points[0];
        var prefix = window.location.pathname.split("/run/")[0];
        return prefix + "/run/" + encodeURIComponent(run) + "/head/" + Math.round(point.x) + "/" + Math.round(point.y) + (kept ? "?plan=" + encodeURIComponent(kept) : "");
      },
    },
  });
})();
