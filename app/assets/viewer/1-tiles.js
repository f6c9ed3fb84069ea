/* Tiles of a head's map: fetched when they are in sight, decoded once, kept while there is room. */
(function () {
  "use strict";
  var HS = (window.headscope = window.headscope || {});
  var HEADER = 16, ROOM = 120, FLIGHTS = 4, AGAIN = 5000;

  /* Every float16 as a number and as its logarithm, by code. */
  var VALUE = new Float32Array(65536), LOG = new Float32Array(65536);
  for (var code = 0; code < 65536; code++) {
    var sign = code & 0x8000 ? -1 : 1, power = (code >> 10) & 31, rest = code & 1023;
    VALUE[code] = power === 31 ? (rest ? NaN : sign * Infinity) : power ? sign * Math.pow(2, power - 25) * (1024 + rest) : sign * Math.pow(2, -24) * rest;
    LOG[code] = VALUE[code] > 0 ? Math.log10(VALUE[code]) : VALUE[code] === 0 ? -Infinity : NaN;
  }

  function decode(buffer) {
    var view = new DataView(buffer);
    if (view.getUint32(0) !== 0x4853544c || view.getUint8(4) !== 1) throw new Error("not a tile");
    var rows = view.getUint16(8, true), columns = view.getUint16(10, true);
    return { rows: rows, columns: columns, kind: view.getUint8(5), scale: view.getFloat32(12, true), codes: new Uint16Array(buffer, HEADER, rows * columns), paint: null, used: 0 };
  }

  /* `address(block, i, j)` says where a tile is; `arrived` is called when the screen may have become sharper. */
  function Tiles(address, arrived, failed) {
    this.address = address;
    this.arrived = arrived;
    this.failed = failed;
    this.held = new Map();
    this.flights = new Map();
    this.wanted = [];
    this.broken = new Map();
    this.clock = 0;
  }

  Tiles.prototype.peek = function (block, i, j) {
    var tile = this.held.get(block + "/" + i + "/" + j);
    if (tile) tile.used = ++this.clock;
    return tile;
  };

  /* The tiles wanted now, most wanted first; what is no longer wanted is not fetched, and stopped if it is on its way. */
  Tiles.prototype.want = function (list) {
    var names = new Set(list.map(function (at) { return at.join("/"); })), self = this;
    this.flights.forEach(function (control, name) { if (!names.has(name)) { control.abort(); self.flights.delete(name); } });
    this.wanted = list.filter(function (at) {
      var name = at.join("/");
      return !self.held.has(name) && !self.flights.has(name) && !(Date.now() - self.broken.get(name) < AGAIN);
    });
    this.pump();
  };

  Tiles.prototype.pump = function () {
    while (this.wanted.length && this.flights.size < FLIGHTS) this.fly(this.wanted.shift());
  };

  Tiles.prototype.fly = function (at) {
    var self = this, name = at.join("/"), control = new AbortController();
    this.flights.set(name, control);
    fetch(this.address(at[0], at[1], at[2]), { signal: control.signal, credentials: "same-origin" })
      .then(function (answer) {
        if (!answer.ok) return answer.text().then(function (text) { throw new Error(text.trim()); });
        return answer.arrayBuffer();
      })
      .then(function (buffer) {
        var tile = decode(buffer);
        tile.used = ++self.clock;
        self.held.set(name, tile);
        self.trim();
        self.landed(name, control);
        self.arrived();
      })
      .catch(function (error) {
        if (error.name === "AbortError") return;
        self.broken.set(name, Date.now());
        self.landed(name, control);
        self.failed(error.message);
      });
  };

  Tiles.prototype.landed = function (name, control) {
    if (this.flights.get(name) === control) this.flights.delete(name);
    this.pump();
  };

  Tiles.prototype.trim = function () {
    if (this.held.size <= ROOM) return;
    var oldest = Array.from(this.held.entries()).sort(function (a, b) { return a[1].used - b[1].used; });
    for (var at = 0; at < oldest.length - ROOM; at++) this.held.delete(oldest[at][0]);
  };

  Tiles.prototype.busy = function () { return this.flights.size + this.wanted.length; };

  /* The text, in pages. */
  function Pieces(base, version, size, arrived) {
    this.base = base;
    this.version = version;
    this.size = size;
    this.pages = new Map();
    this.arrived = arrived;
  }

  Pieces.prototype.at = function (position) {
    var page = Math.floor(position / this.size), known = this.pages.get(page), self = this;
    if (known === undefined) {
      this.pages.set(page, null);
      fetch(this.base + page + "?v=" + this.version, { credentials: "same-origin" })
        .then(function (answer) { return answer.ok ? answer.json() : []; })
        .then(function (list) { self.pages.set(page, list); self.arrived(); })
        .catch(function () { self.pages.set(page, []); });
      return "";
    }
    return known ? known[position - page * this.size] || "" : "";
  };

  /* The first words of a stretch, white space made visible. */
  Pieces.prototype.words = function (first, last) {
    var text = "";
    for (var at = first; at < Math.min(last, first + 12) && text.length < 24; at++) text += this.at(at);
    text = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
    return text.length > 24 ? text.slice(0, 23) + "…" : text;
  };

  HS.tiles = { Tiles: Tiles, Pieces: Pieces, decode: decode, VALUE: VALUE, LOG: LOG };
})();
