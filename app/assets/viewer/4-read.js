/* Reading the map: the colour range, the cell under the pointer, the profiles of its row and column, mouse and keyboard. */
(function () {
  "use strict";
  var HS = window.headscope, paint = HS.paint, VALUE = HS.tiles.VALUE;

  /* Runs over the cells in sight of one tile: each(value, row, column). */
  function scan(viewer, at, tile, each) {
    var block = at[0], side = viewer.facts.tile, span = viewer.window(), hidden = at[2] === 0 ? viewer.hiddenKeys(block) : 0;
    var r0 = Math.max(Math.floor(span[0] / block) - at[1] * side, 0), r1 = Math.min(Math.ceil(span[1] / block) - at[1] * side, tile.rows);
    var c0 = Math.max(Math.floor(span[2] / block) - at[2] * side, hidden), c1 = Math.min(Math.ceil(span[3] / block) - at[2] * side, tile.columns);
    for (var r = r0; r < r1; r++) for (var c = c0; c < c1; c++) each(VALUE[tile.codes[r * tile.columns + c]] * tile.scale, r, c);
  }

  /* From the largest cell in sight down: five decades, or to zero; and the largest cell of every row. */
  HS.domain = function (viewer, wanted) {
    var set = viewer.sets[viewer.plane], top = 0, tops = {};
    wanted.forEach(function (at) {
      var tile = set.peek(at[0], at[1], at[2]), mine = (tops[at[1]] = tops[at[1]] || new Float32Array(viewer.facts.tile));
      if (tile) scan(viewer, at, tile, function (value, r) { if (value > top) top = value; if (value > mine[r]) mine[r] = value; });
    });
    if (!wanted.length && !viewer.domain) top = 1;
    if (!wanted.length && viewer.domain) top = viewer.domain.high;
    if (!(top > 0)) top = 1;
    return { name: viewer.plane + viewer.scale + viewer.hidden, scale: viewer.scale, low: top * Math.pow(10, -paint.DECADES), high: top, tops: tops, block: viewer.target.block };
  };

  /* How a tile is painted. Coarser tiles that stand in for missing ones are scaled to what a cell of the wanted size would hold. */
  HS.manner = function (viewer, at, tile) {
    var domain = viewer.domain, block = viewer.target.block, colours = viewer.colours(), row = viewer.scale === "row";
    var gain = viewer.plane === "mass" ? block / at[0] : 1, tops = null, hidden = at[2] === 0 ? viewer.hiddenKeys(at[0]) : 0;
    if (row) {
      tops = at[0] === block && domain.tops[at[1]];
      if (!tops) {
        tops = new Float32Array(tile.rows);
        scan(viewer, at, tile, function (value, r) { if (value * gain > tops[r]) tops[r] = value * gain; });
      }
    }
    var key = [colours.scheme, viewer.scale, domain.low, domain.high, gain, hidden, row ? viewer.window().join() : ""].join("|");
    return { key: key, words: colours.words, scale: row ? "linear" : viewer.scale, low: domain.low, high: domain.high, gain: gain, hidden: hidden, tops: tops };
  };

  function span(first, block, tokens) {
    var last = Math.min(first + block, tokens) - 1;
    return first === last ? first.toLocaleString("en") : first.toLocaleString("en") + " to " + last.toLocaleString("en");
  }

  function tipRow(parent, label, value, note) {
    var made = document.createElement("div");
    made.className = "tip-row";
    [["span", "tip-label", label], ["b", "", value], ["span", "tip-note", note]].forEach(function (part) {
      var child = document.createElement(part[0]);
      child.className = part[1];
      child.textContent = part[2];
      made.appendChild(child);
    });
    parent.appendChild(made);
  }

  /* Cells in sight of one row (or column) of the map: [[position, value], ...]. */
  HS.profile = function (viewer, cell, along) {
    var block = viewer.target.block, at = viewer.window(), out = [], first = along === "row" ? at[2] : at[0], last = along === "row" ? at[3] : at[1];
    var hidden = viewer.hiddenKeys(block) * block;
    for (var place = Math.floor(first / block) * block; place < last; place += block) {
      if (along === "row" && place < hidden) continue;
      var found = along === "row" ? viewer.cellOf(cell.query, place) : viewer.cellOf(place, cell.key);
      if (found && found.value === found.value) out.push([place, found.value]);
    }
    return out;
  };

  function bands(viewer, context, cell, colours) {
    var box = viewer.box, view = viewer.view, block = viewer.target.block, high = HS.BAND;
    [["row", HS.profile(viewer, cell, "row")], ["column", HS.profile(viewer, cell, "column")]].forEach(function (pair) {
      var top = pair[1].reduce(function (most, point) { return Math.max(most, point[1]); }, 0);
      if (!top) return;
      context.fillStyle = colours.accent;
      context.globalAlpha = 0.75;
      pair[1].forEach(function (point) {
        var size = Math.max(block / view.s, 1), length = (point[1] / top) * (high - 8), place;
        if (pair[0] === "row") { place = box.x + (point[0] - view.k) / view.s; context.fillRect(Math.max(place, box.x), box.y - 5 - length, Math.min(size, box.x + box.used - Math.max(place, box.x)), length); }
        else { place = box.y + (point[0] - view.q) / view.s; context.fillRect(box.band, Math.max(place, box.y), length, Math.min(size, box.y + box.h - Math.max(place, box.y))); }
      });
      context.globalAlpha = 1;
      context.fillStyle = colours.muted;
      context.font = "10.5px " + colours.font;
      context.textBaseline = "top";
      if (pair[0] === "row") { context.textAlign = "left"; context.fillText("row profile, to " + paint.plain(top), box.x, 0); }
      else {
        var narrow = viewer.host.clientWidth - box.band < 120;
        context.textAlign = narrow ? "right" : "left";
        context.fillText("column, to " + paint.plain(top), narrow ? viewer.host.clientWidth - 2 : box.band, box.y - 15);
      }
    });
  }

  HS.Viewer.prototype.point = function () {
    var context = this.over.getContext("2d"), colours = this.colours(), box = this.box, view = this.view;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.host.clientWidth, this.host.clientHeight);
    if (!this.target) return;
    var cell = this.hover ? this.cellAt(this.hover[0], this.hover[1]) : null, read = cell || (this.lock ? this.cellOf(this.lock[0], this.lock[1]) : null);
    if (read) bands(this, context, read, colours);
    context.save();
    context.beginPath();
    context.rect(box.x, box.y, box.used, box.tall);
    context.clip();
    if (this.lock) {
      context.strokeStyle = colours.drop;
      context.setLineDash([3, 3]);
      var y = box.y + (this.lock[0] + 0.5 - view.q) / view.s, x = box.x + (this.lock[1] + 0.5 - view.k) / view.s;
      paint.line(context, box.x, y, box.x + box.used, y);
      if (this.lock[1] >= 0) paint.line(context, x, box.y, x, box.y + box.tall);
      context.setLineDash([]);
    }
    if (cell) {
      var size = Math.max(cell.block / view.s, 3);
      context.strokeStyle = colours.text;
      context.strokeRect(box.x + (cell.c * cell.block - view.k) / view.s + 0.5, box.y + (cell.r * cell.block - view.q) / view.s + 0.5, size, size);
    }
    if (this.band) {
      context.strokeStyle = colours.accent;
      context.strokeRect(Math.min(this.band[0], this.band[2]), Math.min(this.band[1], this.band[3]), Math.abs(this.band[2] - this.band[0]), Math.abs(this.band[3] - this.band[1]));
    }
    context.restore();
    this.say(cell);
  };

  HS.Viewer.prototype.say = function (cell) {
    var tip = this.tip, facts = this.facts;
    if (!cell || cell.value !== cell.value) { tip.hidden = true; return; }
    var q0 = cell.r * cell.block, k0 = cell.c * cell.block;
    tip.replaceChildren();
    tipRow(tip, cell.block === 1 ? "query" : "queries", span(q0, cell.block, facts.tokens), this.pieces.words(q0, Math.min(q0 + cell.block, facts.tokens)));
    tipRow(tip, cell.block === 1 ? "key" : "keys", span(k0, cell.block, facts.tokens), this.pieces.words(k0, Math.min(k0 + cell.block, facts.tokens)));
    tipRow(tip, cell.block === 1 ? "weight" : this.plane === "mass" ? "mass per query" : "largest weight", paint.plain(cell.value), cell.block === 1 ? "exact" : "");
    if (this.plan) {
      var at = [cell.block, Math.floor(cell.r / facts.tile), Math.floor(cell.c / facts.tile)], kept = this.plan.peek(at[0], at[1], at[2]);
      if (kept) tipRow(tip, "plan keeps", Math.round(100 * VALUE[kept.codes[(cell.r - at[1] * facts.tile) * kept.columns + cell.c - at[2] * facts.tile]] * kept.scale) + " %", "");
    }
    tip.hidden = false;
    var x = this.hover[0] + 16, y = this.hover[1] + 14;
    if (x + tip.offsetWidth > this.host.clientWidth) x = this.hover[0] - tip.offsetWidth - 12;
    if (y + tip.offsetHeight > this.host.clientHeight) y = this.hover[1] - tip.offsetHeight - 10;
    tip.style.transform = "translate(" + Math.max(x, 0) + "px," + Math.max(y, 0) + "px)";
  };

  HS.input = function (viewer) {
    var host = viewer.host, from = null;
    var at = function (event) { var box = host.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    var later = function () { if (!viewer.pointing) viewer.pointing = requestAnimationFrame(function () { viewer.pointing = 0; viewer.point(); }); };
    host.onwheel = function (event) {
      event.preventDefault();
      var place = at(event);
      viewer.zoom(Math.exp(Math.max(Math.min(event.deltaY * (event.deltaMode ? 20 : 1), 240), -240) * 0.0022), place[0], place[1]);
    };
    host.onpointerdown = function (event) {
      if (event.button) return;
      from = { at: at(event), view: viewer.view, box: event.shiftKey, moved: false };
      host.setPointerCapture(event.pointerId);
      host.focus({ preventScroll: true });
    };
    host.onpointermove = function (event) {
      var place = at(event);
      viewer.hover = place;
      if (from && (from.moved || Math.hypot(place[0] - from.at[0], place[1] - from.at[1]) > 3)) {
        from.moved = true;
        viewer.inward = false;
        if (from.box) { viewer.band = [from.at[0], from.at[1], place[0], place[1]]; later(); }
        else viewer.move(from.view.q - (place[1] - from.at[1]) * from.view.s, from.view.k - (place[0] - from.at[0]) * from.view.s, from.view.s);
      } else later();
    };
    host.onpointerup = function (event) {
      var start = from, place = at(event), view = viewer.view, box = viewer.box;
      from = viewer.band = null;
      if (!start) return;
      if (start.moved && start.box) {
        var q = [start.at[1], place[1]].map(function (y) { return view.q + (y - box.y) * view.s; }).sort(function (a, b) { return a - b; });
        var k = [start.at[0], place[0]].map(function (x) { return view.k + (x - box.x) * view.s; }).sort(function (a, b) { return a - b; });
        viewer.fit([q[0], q[1], k[0], k[1]]);
      } else if (!start.moved) {
        var cell = viewer.cellAt(place[0], place[1]);
        if (cell) { viewer.lock = [cell.query, cell.key]; viewer.tell.pick(cell.query, cell.key); viewer.point(); }
      }
    };
    host.onpointerleave = function () { viewer.hover = null; later(); };
    host.ondblclick = function () { viewer.fit([]); };
    host.onkeydown = function (event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      var view = viewer.view, box = viewer.box, step = (event.shiftKey ? 0.5 : 0.12), x = box.x + box.used / 2, y = box.y + box.h / 2, lock = viewer.lock;
      var middle = lock || [view.q + (box.h / 2) * view.s, view.k + (box.used / 2) * view.s];
      var act = {
        ArrowLeft: function () { viewer.move(view.q, view.k - step * box.used * view.s, view.s); },
        ArrowRight: function () { viewer.move(view.q, view.k + step * box.used * view.s, view.s); },
        ArrowUp: function () { viewer.move(view.q - step * box.h * view.s, view.k, view.s); },
        ArrowDown: function () { viewer.move(view.q + step * box.h * view.s, view.k, view.s); },
        "+": function () { viewer.zoom(0.7, x, y); }, "=": function () { viewer.zoom(0.7, x, y); },
        "-": function () { viewer.zoom(1 / 0.7, x, y); }, "0": function () { viewer.fit([]); }, Home: function () { viewer.fit([]); },
        e: function () { viewer.near(middle[0], middle[1]); }, Escape: function () { viewer.lock = null; viewer.point(); }
      }[event.key];
      if (!act) return;
      event.preventDefault();
      event.stopPropagation();
      act();
    };
  };
})();
