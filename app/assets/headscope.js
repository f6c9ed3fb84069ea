/* Clientside callbacks: addresses, clicks, hover, the text strip, the arrow keys. Everything that needs no numbers from the server. */
(function () {
  "use strict";
  var NO = function () { return window.dash_clientside.no_update; };
  var COOKIE = "headscope-scheme";

  function replaceQuery(pairs) {
    var query = new URLSearchParams();
    Object.keys(pairs).forEach(function (key) { if (pairs[key] !== null && pairs[key] !== undefined && pairs[key] !== "") query.set(key, pairs[key]); });
    var text = query.toString().replace(/%2C/g, ",");
    var address = window.location.pathname + (text ? "?" + text : "");
    if (address !== window.location.pathname + window.location.search) window.history.replaceState(window.history.state, "", address);
    return text;
  }

  function headAddress(run, layer, head) {
    var prefix = window.location.pathname.split("/run/")[0];
    return prefix + "/run/" + encodeURIComponent(run) + "/head/" + layer + "/" + head;
  }

  /* A block's place as text: "256 to 271". */
  function span(first, block, tokens) {
    var last = Math.min(first + block, tokens) - 1;
    return first === last ? first.toLocaleString("en") : first.toLocaleString("en") + " to " + last.toLocaleString("en");
  }

  function row(label, value, note) {
    var text = function (type, content, name) { return { namespace: "dash_html_components", type: type, props: { children: content, className: name } }; };
    return text("Div", [text("Span", label, "tip-label"), text("B", value, ""), text("Span", note || "", "tip-note")], "tip-row");
  }

  function plain(value) {
    if (value === 0) return "0";
    return Math.abs(value) < 0.001 ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    headscope: {
      heads_url: function (metric, scale, roles) {
        return replaceQuery({ metric: metric, scale: scale === "value" ? "" : scale, roles: (roles || []).join(",") });
      },

      open_head: function (grid, ordered, cell, run, rows) {
        var trigger = (window.dash_clientside.callback_context.triggered[0] || {}).prop_id || "";
        var point;
        if (trigger.indexOf("grid.") === 0 && grid) {
          point = grid.points[0];
          return headAddress(run, Math.round(point.x), Math.round(point.y));
        }
        if (trigger.indexOf("ordered.") === 0 && ordered && ordered.points[0].customdata) {
          point = ordered.points[0].customdata;
          return headAddress(run, point[0], point[1]);
        }
        if (trigger.indexOf("table.") === 0 && cell && rows && rows[cell.rowIndex]) {
          return headAddress(run, rows[cell.rowIndex].layer, rows[cell.rowIndex].head);
        }
        return NO();
      },

      head_url: function (plane, scale, sink, win, series, colour, token, usual) {
        var links = Array.prototype.slice.call(arguments, 8);
        var plots = (series || []).join(",");
        var query = replaceQuery({
          plane: plane === usual.plane ? "" : plane,
          scale: scale === usual.scale ? "" : scale,
          sink: sink ? "hidden" : "",
          q: win.length ? win[0] + "-" + win[1] : "",
          k: win.length ? win[2] + "-" + win[3] : "",
          plots: plots === usual.plots ? "" : plots,
          colour: colour === usual.colour ? "" : colour,
          token: token < 0 ? "" : token
        });
        return links.map(function (link) { return link.split("?")[0] + (query ? "?" + query : ""); });
      },

      pick_token: function (click) {
        if (click && click.points.length) window.dash_clientside.set_props("token", { data: Math.round(click.points[0].x) });
        return NO();
      },

      map_tip: function (hover, figure) {
        if (!hover || !hover.points.length || !figure) return [false, NO(), NO()];
        var point = hover.points[0], meta = figure.layout.meta;
        if (point.z === null || point.z === undefined || Number.isNaN(point.z)) return [false, NO(), NO()];
        var r = Math.floor((point.y - meta.q0) / meta.block), c = Math.floor((point.x - meta.k0) / meta.block);
        var value = meta.log ? Math.pow(10, point.z) : point.z;
        var kind = meta.plane === "mass" ? "mass per query" : "largest weight";
        var floor = meta.log && point.z <= figure.data[0].zmin + 1e-9 ? "at most " : "";
        return [true, point.bbox, [
          row("queries", span(meta.q0 + r * meta.block, meta.block, meta.tokens), meta.rows[r]),
          row("keys", span(meta.k0 + c * meta.block, meta.block, meta.tokens), meta.columns[c]),
          row(kind, floor + plain(value), "")
        ]];
      },

      strip: function (data, token) {
        var strip = document.getElementById("strip");
        if (strip && data) drawStrip(strip, data, token);
        return "";
      }
    }
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
    if (at.closest && at.closest("input, textarea, select, [role=listbox], [role=radiogroup], .ag-root, #strip, [contenteditable=true]")) return;
    var link = document.getElementById(KEYS[event.key]);
    if (!link) return;
    event.preventDefault();
    if (!link.closest(".step-none")) link.click();
  });
})();
