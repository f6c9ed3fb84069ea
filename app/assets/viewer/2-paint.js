/* Colours, axes and labels of the map, for the screen and for exported figures alike. Cells are never interpolated. */
(function () {
  "use strict";
  var HS = (window.headscope = window.headscope || {});
  var VALUE = HS.tiles.VALUE, LOG = HS.tiles.LOG, STEPS = 512, DECADES = 5;

  function rgb(text) { return [1, 3, 5].map(function (at) { return parseInt(text.slice(at, at + 2), 16); }); }

  /* STEPS colours along a scale, as the 32-bit words of a canvas. */
  function ramp(colours) {
    var words = new Uint32Array(STEPS), stops = colours.map(rgb), bytes = new Uint8ClampedArray(words.buffer);
    for (var at = 0; at < STEPS; at++) {
      var place = (at / (STEPS - 1)) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2), share = place - low;
      for (var c = 0; c < 3; c++) bytes[4 * at + c] = Math.round(stops[low][c] + (stops[low + 1][c] - stops[low][c]) * share);
      bytes[4 * at + 3] = 255;
    }
    return words;
  }

  /* A tile as a small picture, one pixel a cell. `how`: { key, words, scale, low, high, gain, hidden, tops }. */
  function picture(tile, how) {
    if (tile.paint && tile.paint.key === how.key) return tile.paint.canvas;
    var canvas = tile.paint ? tile.paint.canvas : document.createElement("canvas");
    canvas.width = tile.columns;
    canvas.height = tile.rows;
    var context = canvas.getContext("2d"), image = context.createImageData(tile.columns, tile.rows);
    var out = new Uint32Array(image.data.buffer), codes = tile.codes, words = how.words, top = STEPS - 1, at = 0;
    var gain = tile.scale * how.gain;
    for (var r = 0; r < tile.rows; r++) {
      var limit = how.tops ? how.tops[r] : how.high;
      var slope, base;
      if (how.scale === "log") { slope = top / (Math.log10(how.high) - Math.log10(how.low)); base = (Math.log10(gain) - Math.log10(how.low)) * slope; }
      else { slope = limit > 0 ? (gain / limit) * top : 0; base = 0; }
      for (var c = 0; c < tile.columns; c++, at++) {
        var code = codes[at];
        if (c < how.hidden || VALUE[code] !== VALUE[code]) { out[at] = 0; continue; }
        var step = how.scale === "log" ? LOG[code] * slope + base : VALUE[code] * slope + base;
        out[at] = words[step >= top ? top : step > 0 ? step | 0 : 0];
      }
    }
    context.putImageData(image, 0, 0);
    tile.paint = { key: how.key, canvas: canvas };
    return canvas;
  }

  /* What a plan would drop, as a veil: nothing where all is kept, `colour` where nothing is. Cells hold the kept share. */
  function veil(tile, colour) {
    if (tile.paint && tile.paint.key === colour) return tile.paint.canvas;
    var canvas = document.createElement("canvas"), word = rgb(colour);
    canvas.width = tile.columns;
    canvas.height = tile.rows;
    var context = canvas.getContext("2d"), image = context.createImageData(tile.columns, tile.rows), data = image.data;
    for (var at = 0; at < tile.codes.length; at++) {
      var kept = VALUE[tile.codes[at]] * tile.scale;
      if (kept !== kept) continue;
      for (var c = 0; c < 3; c++) data[4 * at + c] = word[c];
      data[4 * at + 3] = Math.round(175 * (1 - Math.min(kept, 1)));
    }
    context.putImageData(image, 0, 0);
    tile.paint = { key: colour, canvas: canvas };
    return canvas;
  }

  /* Steps of 1, 2 or 5 times a power of ten that leave at least `room` pixels between labels. */
  function ticks(low, high, pixels, room) {
    var span = high - low, raw = (span * room) / Math.max(pixels, 1), power = Math.pow(10, Math.floor(Math.log10(Math.max(raw, 1e-12))));
    var step = [1, 2, 5, 10].map(function (n) { return n * power; }).find(function (n) { return n >= raw; }) || raw;
    step = Math.max(step, 1);
    var out = [];
    for (var at = Math.ceil(low / step) * step; at <= high + 1e-9; at += step) out.push(Math.round(at));
    return out;
  }

  var SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  function tenth(power) { return power === 0 ? "1" : "10" + String(power).split("").map(function (sign) { return SUPER[sign]; }).join(""); }

  function plain(value) {
    if (value === 0) return "0";
    if (value !== value) return "n/a";
    var size = Math.abs(value);
    return size < 0.001 ? value.toExponential(2) : size >= 1e4 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(4)).toString();
  }

  /* [value, label] pairs of a colour bar. */
  function marks(scale, low, high) {
    var out = [], at;
    if (scale === "row") return [[0, "0"], [0.5, "½"], [1, "1"]];
    if (scale === "log") {
      for (at = Math.ceil(Math.log10(low) - 1e-9); at <= Math.floor(Math.log10(high) + 1e-9); at++) out.push([Math.pow(10, at), tenth(at)]);
      return out;
    }
    var power = Math.pow(10, Math.floor(Math.log10(high)));
    var step = [0.2, 0.5, 1, 2, 5].map(function (n) { return n * power; }).find(function (n) { return high / n <= 5; }) || high;
    for (at = 0; at <= high + 1e-12; at += step) out.push([at, plain(Number(at.toPrecision(6)))]);
    return out;
  }

  /* A context that writes SVG: the few calls that the figure's frame needs. */
  function Svg(width, height) {
    this.parts = [];
    this.width = width;
    this.height = height;
    this.fillStyle = this.strokeStyle = "#000";
    this.lineWidth = 1;
    this.font = "12px sans-serif";
    this.textAlign = "left";
    this.textBaseline = "alphabetic";
    this.globalAlpha = 1;
    this.turn = null;
  }
  var escape = function (text) { return String(text).replace(/[&<>"]/g, function (c) { return { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" }[c]; }); };
  Svg.prototype = {
    fillRect: function (x, y, w, h) { this.parts.push('<rect x="' + x + '" y="' + y + '" width="' + w + '" height="' + h + '" fill="' + this.fillStyle + '" fill-opacity="' + this.globalAlpha + '"/>'); },
    strokeRect: function (x, y, w, h) { this.parts.push('<rect x="' + x + '" y="' + y + '" width="' + w + '" height="' + h + '" fill="none" stroke="' + this.strokeStyle + '" stroke-width="' + this.lineWidth + '"/>'); },
    line: function (a, b, c, d) { this.parts.push('<line x1="' + a + '" y1="' + b + '" x2="' + c + '" y2="' + d + '" stroke="' + this.strokeStyle + '" stroke-width="' + this.lineWidth + '"/>'); },
    fillText: function (text, x, y) {
      var size = parseFloat((/([\d.]+)px/.exec(this.font) || [0, 12])[1]), shift = { middle: 0.35, top: 0.8, alphabetic: 0, bottom: -0.2 }[this.textBaseline] || 0;
      var anchor = { left: "start", center: "middle", right: "end" }[this.textAlign];
      var place = this.turn ? 'transform="translate(' + this.turn[0] + " " + this.turn[1] + ') rotate(-90)" x="0" y="' + shift * size + '"' : 'x="' + x + '" y="' + (y + shift * size) + '"';
      this.parts.push("<text " + place + ' font-size="' + size + '" font-family="Inter, Helvetica, Arial, sans-serif" fill="' + this.fillStyle + '" text-anchor="' + anchor + '">' + escape(text) + "</text>");
    },
    image: function (address, x, y, w, h) { this.parts.push('<image x="' + x + '" y="' + y + '" width="' + w + '" height="' + h + '" preserveAspectRatio="none" style="image-rendering:pixelated" href="' + address + '"/>'); },
    text: function () {
      return '<svg xmlns="http://www.w3.org/2000/svg" width="' + this.width + '" height="' + this.height + '" viewBox="0 0 ' + this.width + " " + this.height + '">' + this.parts.join("") + "</svg>";
    }
  };

  function line(context, a, b, c, d) {
    if (context.line) { context.line(a, b, c, d); return; }
    context.beginPath();
    context.moveTo(a, b);
    context.lineTo(c, d);
    context.stroke();
  }

  /* Axes, ticks, names and the colour bar around the cells. */
  function frame(context, box, view, colours, domain, label) {
    var at, x, y;
    context.lineWidth = 1;
    context.strokeStyle = colours.line;
    context.strokeRect(box.x - 0.5, box.y - 0.5, box.w + 1, box.h + 1);
    context.fillStyle = colours.muted;
    context.font = "11px " + colours.font;
    context.textAlign = "center";
    context.textBaseline = "top";
    ticks(Math.max(view.k, 0), Math.min(view.k + box.w * view.s, view.tokens), Math.min(box.w, view.tokens / view.s), 74).forEach(function (k) {
      x = Math.round(box.x + (k - view.k) / view.s);
      line(context, x + 0.5, box.y + box.h + 1, x + 0.5, box.y + box.h + 5);
      context.fillText(k.toLocaleString("en"), x, box.y + box.h + 8);
    });
    context.textAlign = "right";
    context.textBaseline = "middle";
    ticks(Math.max(view.q, 0), Math.min(view.q + box.h * view.s, view.tokens), Math.min(box.h, view.tokens / view.s), 46).forEach(function (q) {
      y = Math.round(box.y + (q - view.q) / view.s);
      line(context, box.x - 5, y + 0.5, box.x - 1, y + 0.5);
      context.fillText(q.toLocaleString("en"), box.x - 8, y);
    });
    context.textAlign = "center";
    context.textBaseline = "top";
    context.fillText("key position", box.x + box.w / 2, box.y + box.h + 25);
    context.textBaseline = "middle";
    if (context.line) { context.turn = [12, box.y + box.h / 2]; context.fillText("query position", 0, 0); context.turn = null; }
    else { context.save(); context.translate(12, box.y + box.h / 2); context.rotate(-Math.PI / 2); context.fillText("query position", 0, 0); context.restore(); }
    if (!domain) return;
    var bar = { x: box.bar, y: box.y, w: 10, h: box.h }, n = Math.min(96, Math.round(bar.h));
    for (at = 0; at < n; at++) {
      var word = colours.words[Math.round(((n - 1 - at) / (n - 1)) * (STEPS - 1))];
      context.fillStyle = "rgb(" + (word & 255) + "," + ((word >> 8) & 255) + "," + ((word >> 16) & 255) + ")";
      context.fillRect(bar.x, bar.y + (at * bar.h) / n, bar.w, bar.h / n + 0.6);
    }
    context.fillStyle = colours.muted;
    context.textAlign = "left";
    marks(domain.scale, domain.low, domain.high).forEach(function (mark) {
      var share = domain.scale === "log" ? (Math.log10(mark[0]) - Math.log10(domain.low)) / (Math.log10(domain.high) - Math.log10(domain.low)) : mark[0] / (domain.scale === "row" ? 1 : domain.high);
      var place = bar.y + bar.h * (1 - share);
      line(context, bar.x + bar.w, place, bar.x + bar.w + 3, place);
      context.fillText(mark[1], bar.x + bar.w + 6, Math.min(Math.max(place, bar.y + 5), bar.y + bar.h - 5));
    });
    if (label) { context.textBaseline = "top"; context.textAlign = "right"; context.fillText(label, box.right, box.y + box.h + 25); }
  }

  HS.paint = { ramp: ramp, picture: picture, veil: veil, frame: frame, line: line, plain: plain, Svg: Svg, DECADES: DECADES };
})();
