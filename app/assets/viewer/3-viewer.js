/* The map of one head: pan, zoom, read. A head of 131,072 tokens is 17 thousand million cells; on the screen are the finest blocks that are
 * still larger than a pixel, and from a few thousand tokens on cells recomputed from q and k. What a cell is stands in the badge, always. */
(function () {
  "use strict";
  var HS = window.headscope, paint = HS.paint, VALUE = HS.tiles.VALUE;
  var LEFT = 66, TOP = 44, RIGHT = 108, BOTTOM = 44, BAND = 34, LEAST = 1.2, CLOSEST = 1 / 28;

  function element(name, className, parent) {
    var made = document.createElement(name);
    made.className = className;
    if (parent) parent.appendChild(made);
    return made;
  }

  function Viewer(host, facts, tell) {
    this.host = host;
    this.facts = facts;
    this.tell = tell;
    this.plane = "mass";
    this.scale = "log";
    this.hidden = false;
    this.lock = null;
    this.hover = null;
    this.domain = null;
    this.stats = { draws: 0, draw: 0, first: 0, sharp: 0, asked: 0 };
    host.replaceChildren();
    this.canvas = element("canvas", "viewer-cells", host);
    this.over = element("canvas", "viewer-over", host);
    this.tip = element("div", "viewer-tip", host);
    this.note = element("div", "viewer-note", host);
    this.tip.hidden = true;
    var self = this, again = function () { self.schedule(); };
    var failed = function (message) { self.note.textContent = message; };
    this.sets = {};
    ["mass", "max"].forEach(function (plane) {
      self.sets[plane] = new HS.tiles.Tiles(function (b, i, j) { return facts.base + "/tile/" + plane + "/" + b + "/" + i + "/" + j + "?v=" + facts.version; }, again, failed);
    });
    this.plan = null;
    this.pieces = new HS.tiles.Pieces(facts.words, facts.version, facts.page, function () { self.point(); });
    this.view = null;
    this.resized = new ResizeObserver(function () { self.resize(); });
    this.resized.observe(host);
    this.resize();
    HS.input(this);
  }

  Viewer.prototype.set = function (change) {
    var self = this;
    if (["plane", "scale", "planName"].some(function (name) { return name in change && change[name] !== self[name]; })) this.note.textContent = "";
    Object.keys(change).forEach(function (name) { self[name] = change[name]; });
    if ("planName" in change) {
      var name = change.planName, facts = this.facts;
      this.plan = name ? new HS.tiles.Tiles(function (b, i, j) { return facts.base + "/plan/" + encodeURIComponent(name) + "/" + b + "/" + i + "/" + j + "?v=" + facts.version; }, function () { self.schedule(); }, function (message) { self.note.textContent = message; }) : null;
    }
    this.schedule();
  };

  Viewer.prototype.colours = function () {
    var scheme = document.documentElement.getAttribute("data-mantine-color-scheme") === "dark" ? "dark" : "light";
    if (!this.palette || this.palette.scheme !== scheme) {
      var given = this.facts.palettes[scheme];
      this.palette = { scheme: scheme, words: paint.ramp(given.sequential), muted: given.muted, text: given.text, line: given.line, panel: given.panel, accent: given.accent, drop: given.drop, font: "Inter, ui-sans-serif, system-ui, sans-serif" };
    }
    return this.palette;
  };

  Viewer.prototype.resize = function () {
    var width = this.host.clientWidth, height = this.host.clientHeight, ratio = window.devicePixelRatio || 1, size = [width, height, ratio].join();
    if (!width || !height || size === this.size) return;
    var window_ = this.view ? this.window() : this.facts.window;
    this.size = size;
    this.ratio = ratio;
    [this.canvas, this.over].forEach(function (canvas) {
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(height * this.ratio);
      canvas.style.width = width + "px";
      canvas.style.height = height + "px";
    }, this);
    var whole = !this.view ? !this.facts.window.length : this.isWhole();
    var side = Math.max(Math.min(width - LEFT - RIGHT, height - TOP - BOTTOM), 40);  /* a square, so that what is under the pointer stays there */
    this.box = { x: LEFT, y: TOP, w: side, h: side };
    this.fit(whole ? [] : window_, true);
  };

  /* Goes on in another element of the page, with what it shows and holds. */
  Viewer.prototype.moveTo = function (host) {
    var old = this.host;
    this.resized.disconnect();
    ["onwheel", "onpointerdown", "onpointermove", "onpointerup", "onpointerleave", "ondblclick", "onkeydown"].forEach(function (name) { old[name] = null; });
    old.hsViewer = null;
    host.replaceChildren(this.canvas, this.over, this.tip, this.note);
    this.host = host;
    host.hsViewer = this;
    HS.input(this);
    this.resized.observe(host);
    this.schedule();
  };

  /* Puts the box, the colour bar and the bands around what is left of the plot when the map is narrower than the panel. */
  Viewer.prototype.place = function () {
    var across = Math.min(this.box.w, (this.facts.tokens - this.view.k) / this.view.s);
    this.box.used = Math.max(across, 40);
    this.box.tall = Math.max(Math.min(this.box.h, (this.facts.tokens - this.view.q) / this.view.s), 40);
    this.box.band = this.box.x + this.box.used + 8;
    this.box.bar = this.box.band + BAND + 10;
    this.box.right = this.box.bar + 44;
  };

  Viewer.prototype.furthest = function () { return this.facts.tokens / Math.min(this.box.w, this.box.h); };
  Viewer.prototype.isWhole = function () { return this.view.s >= this.furthest() * 0.999; };

  /* Shows a window [q0, q1, k0, k1], or everything. Tokens have the same size both ways, so more than the window may be in sight. */
  Viewer.prototype.fit = function (span, quiet) {
    var box = this.box;
    if (!span || span.length !== 4) this.move(0, 0, this.furthest(), quiet);
    else {
      var s = Math.max((span[1] - span[0]) / box.h, (span[3] - span[2]) / box.w);
      this.move((span[0] + span[1]) / 2 - (box.h * s) / 2, (span[2] + span[3]) / 2 - (box.w * s) / 2, s, quiet);
    }
  };

  Viewer.prototype.move = function (q, k, s, quiet) {
    var box = this.box, tokens = this.facts.tokens;
    s = Math.min(Math.max(s, CLOSEST), this.furthest());
    q = Math.max(Math.min(q, tokens - box.h * s), 0);
    k = Math.max(Math.min(k, tokens - box.w * s), 0);
    this.view = { q: q, k: k, s: s, tokens: tokens };
    this.stats.asked = performance.now();
    this.stats.first = this.stats.sharp = 0;
    this.schedule();
    if (!quiet) this.settle();
    if (this.tell.moved) this.tell.moved(this.view);
  };

  /* Looks where another viewer of a text of the same length looks. */
  Viewer.prototype.follow = function (view) {
    if (this.view && this.view.q === view.q && this.view.k === view.k && this.view.s === view.s) return;
    var tell = this.tell.moved;
    this.tell.moved = null;
    this.move(view.q, view.k, view.s, true);
    this.tell.moved = tell;
  };

  Viewer.prototype.zoom = function (factor, x, y) {
    var view = this.view, box = this.box, s = Math.min(Math.max(view.s * factor, CLOSEST), this.furthest());
    var q = view.q + (y - box.y) * view.s, k = view.k + (x - box.x) * view.s;
    this.inward = factor < 1;
    this.move(q - (y - box.y) * s, k - (x - box.x) * s, s);
  };

  /* To where single cells can be read, around a cell or the middle. */
  Viewer.prototype.near = function (query, key) {
    var s = 1 / 6, box = this.box;
    this.move(query - (box.h * s) / 2, key - (box.w * s) / 2, s);
  };

  Viewer.prototype.window = function () {
    var view = this.view, box = this.box, n = this.facts.tokens;
    return [Math.floor(view.q), Math.min(Math.ceil(view.q + box.h * view.s), n), Math.floor(view.k), Math.min(Math.ceil(view.k + box.w * view.s), n)];
  };

  Viewer.prototype.settle = function () {
    var self = this;
    clearTimeout(this.settling);
    this.settling = setTimeout(function () { self.tell.window(self.isWhole() ? [] : self.window()); }, 180);
  };

  /* The finest block that is still larger than a pixel. */
  Viewer.prototype.block = function () {
    var all = this.facts.exact.concat(this.facts.stored), s = this.view.s;
    return all.find(function (block) { return block / s >= LEAST; }) || all[all.length - 1];
  };

  Viewer.prototype.inSight = function (block) {
    var side = block * this.facts.tile, at = this.window(), last = Math.ceil(Math.ceil(this.facts.tokens / block) / this.facts.tile) - 1, out = [];
    for (var i = Math.floor(at[0] / side); i <= Math.min(Math.floor((at[1] - 1) / side), last); i++)
      for (var j = Math.floor(at[2] / side); j <= Math.min(Math.floor((at[3] - 1) / side), last); j++)
        if (!this.facts.causal || j <= i) out.push([block, i, j]);
    return out;
  };

  /* The tiles that the next zoom in will ask for, around the pointer: pooled cells take a while to compute. Earlier while zooming in. */
  Viewer.prototype.ahead = function (block) {
    var all = this.facts.exact.concat(this.facts.stored), next = all[all.indexOf(block) - 1], s = next / LEAST, view = this.view, box = this.box;
    if (!next || view.s > (this.inward ? 10 : 2) * s) return [];
    var at = this.hover || [box.x + box.used / 2, box.y + box.h / 2], q = view.q + (at[1] - box.y) * view.s, k = view.k + (at[0] - box.x) * view.s;
    var kept = this.view, out;
    this.view = { q: q - (at[1] - box.y) * s, k: k - (at[0] - box.x) * s, s: s, tokens: view.tokens };
    out = this.inSight(next).filter(function (one) { return one[1] >= 0 && one[2] >= 0; });
    this.view = kept;
    return out.length <= 9 ? out : [];
  };

  Viewer.prototype.hiddenKeys = function (block) { return this.hidden ? Math.ceil(this.facts.sink / block) : 0; };

  Viewer.prototype.schedule = function () {
    var self = this;
    if (this.pending) return;
    this.pending = requestAnimationFrame(function () { self.pending = 0; self.draw(); });
  };

  Viewer.prototype.draw = function () {
    if (!this.host.isConnected) { this.close(); return; }
    var began = performance.now(), block = this.block(), wanted = this.inSight(block), set = this.sets[this.plane], coarse = this.facts.stored[this.facts.stored.length - 1];
    var middle = this.view.k + (this.box.w * this.view.s) / 2, down = this.view.q + (this.box.h * this.view.s) / 2, side = block * this.facts.tile;
    wanted.sort(function (a, b) { return Math.hypot((a[1] + 0.5) * side - down, (a[2] + 0.5) * side - middle) - Math.hypot((b[1] + 0.5) * side - down, (b[2] + 0.5) * side - middle); });
    var missing = wanted.filter(function (at) { return !set.peek(at[0], at[1], at[2]); });
    set.want((set.peek(coarse, 0, 0) ? wanted : [[coarse, 0, 0]].concat(wanted)).concat(missing.length ? [] : this.ahead(block)));
    Object.keys(this.sets).forEach(function (name) { if (this.sets[name] !== set) this.sets[name].want([]); }, this);
    if (this.plan) this.plan.want(wanted);
    this.place();
    this.target = { block: block, wanted: wanted, missing: missing.length };
    if (!missing.length || !this.domain || this.domain.name !== this.plane + this.scale + this.hidden) this.domain = HS.domain(this, missing.length ? [] : wanted) || this.domain;
    var context = this.canvas.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.host.clientWidth, this.host.clientHeight);
    this.cells(context, this.ratio);
    paint.frame(context, this.frameBox(), this.view, this.colours(), this.domain, "");
    this.point();
    var now = performance.now(), stats = this.stats;
    stats.draws += 1;
    stats.draw = now - began;
    if (!stats.first) stats.first = now - stats.asked;
    if (!missing.length && !stats.sharp) {
      stats.sharp = now - stats.asked;
      if (!this.plan) this.note.textContent = "";
    }
    this.tell.badge(this.words(missing.length));
  };

  Viewer.prototype.frameBox = function () { return { x: this.box.x, y: this.box.y, w: this.box.used, h: this.box.tall, bar: this.box.bar, right: this.box.right }; };

  /* Every tile that is there and in sight, coarse ones below; each pixel shows the finest there is. */
  Viewer.prototype.cells = function (context, ratio) {
    var self = this, block = this.target.block, box = this.box, set = this.sets[this.plane];
    context.save();
    context.beginPath();
    context.rect(box.x, box.y, box.used, box.tall);
    context.clip();
    context.imageSmoothingEnabled = false;
    var levels = this.facts.exact.concat(this.facts.stored).filter(function (one) { return self.target.missing ? one >= block : one === block; }).reverse();
    if (this.domain) levels.forEach(function (level) {
      (level === block ? self.target.wanted : self.inSight(level)).forEach(function (at) {
        var tile = set.peek(at[0], at[1], at[2]);
        if (tile) self.put(context, ratio, paint.picture(tile, HS.manner(self, at, tile)), at);
      });
    });
    if (this.plan) this.target.wanted.forEach(function (at) {
      var tile = self.plan.peek(at[0], at[1], at[2]);
      if (tile) self.put(context, ratio, paint.veil(tile, self.colours().drop), at);
    });
    context.restore();
  };

  /* Edges fall on whole pixels, so neighbours meet. */
  Viewer.prototype.put = function (context, ratio, picture, at) {
    var side = at[0] * this.facts.tile, view = this.view, box = this.box;
    var edge = function (from, start, cells) { return [from + (start - (from === box.x ? view.k : view.q)) / view.s, cells * at[0] / view.s]; };
    var x = edge(box.x, at[2] * side, picture.width), y = edge(box.y, at[1] * side, picture.height);
    var snap = function (value) { return Math.round(value * ratio) / ratio; };
    context.drawImage(picture, snap(x[0]), snap(y[0]), snap(x[0] + x[1]) - snap(x[0]), snap(y[0] + y[1]) - snap(y[0]));
  };

  /* What a cell is, in words. */
  Viewer.prototype.words = function (missing) {
    var block = this.target.block, exact = this.facts.exact.indexOf(block) >= 0, words = [];
    if (block === 1) words.push("exact");
    else words.push((exact ? "exact, pooled: " : "") + "block " + this.plane, block + " × " + block + " tokens a cell");
    if (!exact) words.push("level " + (this.facts.stored.indexOf(block) + 1) + " of " + this.facts.stored.length);
    if (this.scale === "row") words.push("share of the row's largest cell in sight");
    if (this.hidden) words.push("keys 0 to " + (this.hiddenKeys(block) * block - 1) + " hidden");
    if (missing) words.push("loading");
    else if (!exact && block === this.facts.stored[0] && this.view.s < block / 24 && this.facts.unkept) words.push(this.facts.unkept);
    return words;
  };

  /* The cell at a point of the panel: { query, key, block, i, j, row, column, value }, null outside the map. */
  Viewer.prototype.cellAt = function (x, y) {
    var box = this.box, view = this.view;
    if (!this.target || x < box.x || y < box.y || x >= box.x + box.used || y >= box.y + box.tall) return null;
    return this.cellOf(Math.floor(view.q + (y - box.y) * view.s), Math.floor(view.k + (x - box.x) * view.s));
  };

  Viewer.prototype.cellOf = function (query, key) {
    var block = this.target.block, tile = this.facts.tile, n = this.facts.tokens;
    if (query < 0 || key < 0 || query >= n || key >= n) return null;
    var r = Math.floor(query / block), c = Math.floor(key / block), at = [block, Math.floor(r / tile), Math.floor(c / tile)];
    var held = this.sets[this.plane].peek(at[0], at[1], at[2]), value = NaN;
    if (held) value = VALUE[held.codes[(r - at[1] * tile) * held.columns + (c - at[2] * tile)]] * held.scale;
    return { query: query, key: key, block: block, r: r, c: c, value: value, there: !!held };
  };

  Viewer.prototype.close = function () { this.resized.disconnect(); };

  HS.Viewer = Viewer;
  HS.BAND = BAND;
})();
