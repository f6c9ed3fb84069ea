/* The live page's address: prompt, change and heads. A long prompt stays out of it, since servers cut long addresses. */
(function () {
  "use strict";
  var LONGEST = 1500;

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    headscope_live: {
      url: function (prompt, change, heads, mode, strength, run) {
        var query = new URLSearchParams();
        if (prompt && prompt.length <= LONGEST) query.set("prompt", prompt);
        if (change && change !== "mask") query.set("change", change);
        if (heads) query.set("heads", heads);
        if (mode && mode !== "zero") query.set("mode", mode);
        if (change !== "mask" && strength !== null && strength !== undefined && strength !== "") query.set("strength", strength);
        if (run) query.set("run", run);
        var text = query.toString();
        var address = window.location.pathname + (text ? "?" + text : "");
        window.history.replaceState(window.history.state, "", address);
        return text;
      },
    },
  });
})();
