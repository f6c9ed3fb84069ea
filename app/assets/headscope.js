/* Clientside callbacks: addresses, clicks, hover, the text strip, the arrow keys. Everything that needs no numbers from the server. */
(function () {
  "use strict";
  var NO = function () { return window.dash_clientside.no_update; };
  var COOKIE = "headscope-scheme";

  function replaceQuery(pairs) {
    var query = new URLSearchParams();
    Object.keys(pairs).forEach(function (key) { if (pairs[key] !== null && pairs[key] !== undefined && pairs[key] !== "") query.set(key, pairs[key]); });
    var now = new URLSearchParams(window.location.search);
    ["frame", "patch"].forEach(function (key) { if (now.has(key) && document.getElementById("pictures")) query.set(key, now.get(key)); });
    var text = query.toString().replace(/%2C/g, ",");
    var address = window.location.pathname + (text ? "?" + text : "");
    if (address !== window.location.pathname + window.location.search) window.history.replaceState(window.history.state, "", address);
    return text;
  }

  function headAddress(run, layer, head) {
    var prefix = window.location.pathname.split("/run/")[0];
    var pins = new URLSearchParams(window.location.search).get("pins");
    return prefix + "/run/" + encodeURIComponent(run) + "/head/" + layer + "/" + head + (pins ? "?pins=" + pins : "");
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    headscope: {
      heads_url: function (metric, scale, roles, x, y, find, picked, pins, usual) {
        var few = (picked || "").split(",").length <= 128;
        return replaceQuery({
          metric: metric,
          scale: scale === "value" ? "" : scale,
          roles: (roles || []).join(","),
          x: x === usual.x ? "" : x,
          y: y === usual.y && x === usual.x ? "" : y,
          find: find,
          picked: find || !few ? "" : picked,
          pins: pins
        });
      },

      /* A box or a lasso in the scatter plot: the heads in it are the picked ones, and the finder's text no longer is what picked them. */
      pick_box: function (selected, picked) {
        if (selected && selected.points) {
          var names = selected.points.filter(function (point) { return point.customdata; }).map(function (point) { return point.customdata.join("."); });
          names = Array.from(new Set(names)).sort(function (a, b) { return parseFloat(a) - parseFloat(b) || a.split(".")[1] - b.split(".")[1]; }).join(",");
          if (names && names !== picked) {
            window.dash_clientside.set_props("find", { value: "" });
            window.dash_clientside.set_props("picked", { data: names });
          }
        }
        return NO();
      },

      pin: function (ticked, rows, pinned, cleared, picked, pins) {
        var chosen = (rows || []).map(function (row) { return row.layer + "." + row.head; }).join(",");
        var trigger = (window.dash_clientside.callback_context.triggered[0] || {}).prop_id || "";
        if (trigger.indexOf("clear-picked") === 0 && cleared) {
          window.dash_clientside.set_props("find", { value: "" });
          window.dash_clientside.set_props("picked", { data: "" });
        }
        if (trigger.indexOf("pin-picked") === 0 && pinned && picked) window.dash_clientside.set_props("pins", { data: joined(pins, picked) });
        if (trigger.indexOf("pin-rows") === 0 && ticked && chosen) window.dash_clientside.set_props("pins", { data: joined(pins, chosen) });
        return !chosen;
      },

      /* The pin of a head's page. */
      pin_here: function (clicks, name, pins) {
        var list = (pins || "").split(",").filter(Boolean), at = list.indexOf(name);
        if (at >= 0) list.splice(at, 1); else list.push(name);
        window.dash_clientside.set_props("pins", { data: list.join(",") });
        return NO();
      },

      open_head: function (grid, ordered, scatter, cell, run, rows) {
        var trigger = (window.dash_clientside.callback_context.triggered[0] || {}).prop_id || "";
        var point;
        if (trigger.indexOf("grid.") === 0 && grid) {
          point = grid.points[0];
          return headAddress(run, Math.round(point.x), Math.round(point.y));
        }
        var plot = trigger.indexOf("ordered.") === 0 ? ordered : trigger.indexOf("scatter.") === 0 ? scatter : null;
        if (plot && plot.points[0].customdata) {
          point = plot.points[0].customdata;
          return headAddress(run, point[0], point[1]);
        }
        if (trigger.indexOf("table.") === 0 && cell && rows && rows[cell.rowIndex] && String(cell.colId).indexOf("ag-Grid") !== 0) {
          return headAddress(run, rows[cell.rowIndex].layer, rows[cell.rowIndex].head);
        }
        return NO();
      },

      head_url: function (plane, scale, sink, win, series, colour, token, key, plan, pins, usual) {
        var links = Array.prototype.slice.call(arguments, 11);
        var plots = (series || []).join(",");
        var query = replaceQuery({
          plane: plane === usual.plane ? "" : plane,
          scale: scale === usual.scale ? "" : scale,
          sink: sink ? "hidden" : "",
          q: win.length ? win[0] + "-" + win[1] : "",
          k: win.length ? win[2] + "-" + win[3] : "",
          plots: plots === usual.plots ? "" : plots,
          colour: colour === usual.colour ? "" : colour,
          token: token < 0 ? "" : token,
          key: key < 0 ? "" : key,
          plan: plan || "",
          pins: pins
        });
        return links.map(function (link) { return link.split("?")[0] + (query ? "?" + query : ""); });
      },

      pick_token: function (click) {
        if (click && click.points.length) window.dash_clientside.set_props("token", { data: Math.round(click.points[0].x) });
        return NO();
      },

      /* The graph along the text waits for a quiet moment, or for somebody who scrolls down to it. */
      lines_soon: function (place, wanted) {
        var frame = document.getElementById("lines-frame");
        if (wanted || !frame || window.Plotly || !window.headscope.quiet) return true;
        window.headscope.quiet(frame, function () { if (frame.isConnected) window.dash_clientside.set_props("lines-wanted", { data: true }); });
        return NO();
      },

      strip: function (data, token) {
        var strip = document.getElementById("strip");
        if (strip && data) drawStrip(strip, data, token);
        return "";
      }
    }
  });

  /* Two lists of heads as one, at most 256. */
  function joined(first, second) {
    return Array.from(new Set((first ? first.split(",") : []).concat(second.split(",")))).slice(0, 256).join(",");
  }

  document.addEventListener("click", function (event) {
    var button = event.target.closest && event.target.closest("[data-unpin]");
    if (!button || (window.headscope || {}).first) return;
    var list = (new URLSearchParams(window.location.search).get("pins") || "").split(",").filter(function (name) { return name && name !== button.dataset.unpin; });
    window.dash_clientside.set_props("pins", { data: list.join(",") });
  });

  /* Mantine writes the scheme on <html>; a change that the cookie does not know was made by a person. */
  new MutationObserver(function () {
    var scheme = document.documentElement.getAttribute("data-mantine-color-scheme");
    if ((scheme !== "light" && scheme !== "dark") || document.cookie.split("; ").indexOf(COOKIE + "=" + scheme) >= 0) return;
    document.cookie = COOKIE + "=" + scheme + "; path=/; SameSite=Lax";
    if (document.getElementById("scheme")) window.dash_clientside.set_props("scheme-now", { data: scheme });
  }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });

  function drawStrip(strip, data, token) {
    if (strip.drawn !== data) {
      var all = document.createDocumentFragment();
      data.tokens.forEach(function (piece, index) {
        var span = document.createElement("span");
        span.className = "tok" + (data.shades[index] >= 0 ? " s" + data.shades[index] : "");
        span.dataset.token = data.start + index;
        span.textContent = piece.indexOf("\n") >= 0 ? piece.replace(/\n/g, "⏎\n") : piece;
        span.title = "#" + (data.start + index) + "   " + data.label + " " + data.numbers[index];
        all.appendChild(span);
      });
      var kept = strip.scrollTop;
      strip.replaceChildren(all);
      strip.scrollTop = kept;
      strip.drawn = data;
    }
    var old = strip.querySelector(".tok-chosen");
    if (old) old.classList.remove("tok-chosen");
    if (token === null || token === undefined) return;
    var chosen = strip.children[token - data.start];
    if (!chosen) return;
    chosen.classList.add("tok-chosen");
    var top = chosen.offsetTop - strip.offsetTop;
    if (top < strip.scrollTop || top > strip.scrollTop + strip.clientHeight - 24) strip.scrollTop = top - strip.clientHeight / 3;
  }

  document.addEventListener("click", function (event) {
    var token = event.target.closest && event.target.closest("#strip .tok");
    if (token) window.dash_clientside.set_props("token", { data: Number(token.dataset.token) });
  });

  var KEYS = { ArrowLeft: "step-left", ArrowRight: "step-right", ArrowUp: "step-up", ArrowDown: "step-down" };
  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || !KEYS[event.key]) return;
    var at = event.target;
    if (at.closest && at.closest("input, textarea, select, [role=listbox], [role=radiogroup], .ag-root, #strip, .viewer, .pictures, [contenteditable=true]")) return;
    var link = document.querySelector("#first ." + KEYS[event.key] + " a") || document.getElementById(KEYS[event.key]);
    if (!link) return;
    event.preventDefault();
    if (!link.closest(".step-none")) link.click();
  });
})();
