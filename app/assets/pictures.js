/* Where a head looks on a picture: one overlay per frame (a word of an answer, a denoising step), and all heads at once. The picture is
 * drawn in grey and the weight as one hue over it, so the overlay reads the same for colour-blind eyes and in both schemes. */
(function () {
  "use strict";
  var HS = (window.headscope = window.headscope || {}), HUE = [230, 110, 0], NO = function () { return window.dash_clientside.no_update; };

  function element(name, className, parent, text) {
    var made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  function remember(pairs) {
    var now = new URLSearchParams(window.location.search);
    Object.keys(pairs).forEach(function (key) { if (pairs[key] === "") now.delete(key); else now.set(key, pairs[key]); });
    var text = now.toString().replace(/%2C/g, ",");
    window.history.replaceState(window.history.state, "", window.location.pathname + (text ? "?" + text : ""));
  }

  /* The weights of one frame as a small picture, a pixel a patch; opacity is the share of `top`. */
  function heat(values, grid, top) {
    var canvas = document.createElement("canvas");
    canvas.width = grid[1];
    canvas.height = grid[0];
    var context = canvas.getContext("2d"), image = context.createImageData(grid[1], grid[0]);
    for (var at = 0; at < grid[0] * grid[1]; at++) {
      var share = top > 0 && values[at] === values[at] ? Math.min(values[at] / top, 1) : 0;
      for (var c = 0; c < 3; c++) image.data[4 * at + c] = HUE[c];
      image.data[4 * at + 3] = Math.round(215 * share);
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function overlay(canvas, picture, cover) {
    var context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    if (picture && picture.complete && picture.naturalWidth) {
      context.filter = "grayscale(1)";
      context.drawImage(picture, 0, 0, canvas.width, canvas.height);
      context.filter = "none";
    }
    if (cover) context.drawImage(cover, 0, 0, canvas.width, canvas.height);
  }

  function most(values) { var top = 0; for (var at = 0; at < values.length; at++) if (values[at] > top) top = values[at]; return top; }
  function sum(values) { var total = 0; for (var at = 0; at < values.length; at++) if (values[at] === values[at]) total += values[at]; return total; }

  /* Pictures by frame, loaded once. */
  function shown(facts, again) {
    var held = {};
    return function (frame) {
      var at = facts.pictures === 1 ? 0 : frame;
      if (!held[at]) { held[at] = new Image(); held[at].onload = again; held[at].src = facts.picture + at + "?v=" + facts.version; }
      return held[at];
    };
  }

  function OneHead(host, facts) {
    var self = this, size = 400, ratio = facts.grid[0] / facts.grid[1];
    this.host = host;
    this.facts = facts;
    this.frame = Math.min(facts.frame, facts.labels.length - 1);
    this.patch = facts.patch;
    host.replaceChildren();
    var left = element("div", "picture-main", host), right = element("div", "picture-side", host);
    this.canvas = element("canvas", "picture-canvas", left);
    this.canvas.width = ratio > 1 ? Math.round(size / ratio) : size;
    this.canvas.height = ratio > 1 ? size : Math.round(size * ratio);
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.say = element("div", "picture-say", left);
    this.picture = shown(facts, function () { self.draw(); });
    this.strip = element("div", "picture-strip", right);
    this.cells = facts.labels.map(function (label, frame) {
      var cell = element("button", "picture-frame", self.strip), small = element("canvas", "", cell);
      cell.type = "button";
      small.width = small.height = 72;
      element("span", "", cell, label.trim() || "␣");
      cell.onclick = function () { self.choose(frame, self.patch); };
      return { cell: cell, canvas: small };
    });
    this.canvas.onmousemove = function (event) { self.read(self.at(event)); };
    this.canvas.onmouseleave = function () { self.read(-1); };
    this.canvas.onclick = function (event) { if (facts.between) self.choose(self.frame, self.at(event) === self.patch ? -1 : self.at(event)); };
    this.canvas.onkeydown = function (event) {
      var way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") self.choose(self.frame, -1);
      if (!way) return;
      event.preventDefault();
      event.stopPropagation();
      self.choose(Math.min(Math.max(self.frame + way, 0), facts.labels.length - 1), self.patch);
    };
    fetch(facts.weights + "?v=" + facts.version).then(function (answer) { return answer.json(); }).then(function (data) { self.weights = data.weights; self.choose(self.frame, self.patch, true); })
      .catch(function () { self.say.textContent = "The weights could not be read."; });
  }

  OneHead.prototype.at = function (event) {
    var box = this.canvas.getBoundingClientRect(), grid = this.facts.grid;
    var r = Math.floor(((event.clientY - box.top) / box.height) * grid[0]), c = Math.floor(((event.clientX - box.left) / box.width) * grid[1]);
    return Math.min(Math.max(r, 0), grid[0] - 1) * grid[1] + Math.min(Math.max(c, 0), grid[1] - 1);
  };

  OneHead.prototype.choose = function (frame, patch, first) {
    var self = this;
    this.frame = frame;
    this.patch = patch;
    if (!first) remember({ frame: frame || "", patch: patch >= 0 ? patch : "" });
    this.from = null;
    this.draw();
    if (patch >= 0 && this.facts.between)
      fetch(this.facts.weights + "/" + frame + "/" + patch + "?v=" + this.facts.version).then(function (answer) { return answer.json(); })
        .then(function (data) { if (self.frame === frame && self.patch === patch) { self.from = data.weights; self.draw(); } });
  };

  OneHead.prototype.values = function () { return this.from || this.weights[this.frame]; };

  OneHead.prototype.draw = function () {
    if (!this.weights) return;
    var self = this, facts = this.facts, values = this.values(), top = most(values), grid = facts.grid;
    overlay(this.canvas, this.picture(this.frame), heat(values, grid, top));
    if (this.from) {
      var context = this.canvas.getContext("2d"), w = this.canvas.width / grid[1], h = this.canvas.height / grid[0];
      context.strokeStyle = "#2f7fd6";
      context.lineWidth = 3;
      context.strokeRect((this.patch % grid[1]) * w + 1, Math.floor(this.patch / grid[1]) * h + 1, w - 2, h - 2);
    }
    this.cells.forEach(function (one, frame) {
      overlay(one.canvas, self.picture(frame), heat(self.weights[frame], grid, most(self.weights[frame])));
      one.cell.classList.toggle("picture-chosen", frame === self.frame);
      one.cell.setAttribute("aria-pressed", frame === self.frame);
    });
    this.read(-1);
  };

  OneHead.prototype.read = function (patch) {
    if (!this.weights) return;
    var facts = this.facts, values = this.values(), number = HS.paint.plain, word = facts.kind === "answer" ? "word" : "step", columns = facts.grid[1];
    var text = word + " " + (this.frame + 1) + " of " + facts.labels.length + " (" + facts.labels[this.frame].trim() + "): ";
    if (this.from) text += "where patch (" + Math.floor(this.patch / columns) + ", " + (this.patch % columns) + ") looks; ";
    else text += facts.kind === "answer" ? number(sum(values)) + " of its weight is on the picture; " : "mean weight that a patch receives; ";
    text += patch >= 0 ? "patch (" + Math.floor(patch / columns) + ", " + (patch % columns) + ") " + number(values[patch]) : "at most " + number(most(values)) + " on a patch";
    this.say.textContent = text;
    this.canvas.setAttribute("aria-label", text);
  };

  /* Every head at once: layers down, heads across. */
  function AllHeads(host, facts) {
    var self = this;
    this.host = host;
    this.facts = facts;
    this.frame = Math.min(facts.frame, facts.labels.length - 1);
    host.replaceChildren();
    this.canvas = element("canvas", "picture-all", host);
    this.canvas.tabIndex = 0;
    this.tip = element("div", "viewer-tip", host);
    this.tip.hidden = true;
    this.picture = shown(facts, function () { self.draw(); });
    this.canvas.onmousemove = function (event) { self.point(event); };
    this.canvas.onmouseleave = function () { self.tip.hidden = true; };
    this.canvas.onclick = function (event) {
      var at = self.at(event);
      var address = at && facts.head + facts.layers[at[0]] + "/" + at[1] + "?frame=" + self.frame;
      if (at && HS.first) window.location.assign(address);
      else if (at) window.dash_clientside.set_props("nav", { href: address });
    };
    this.resized = new ResizeObserver(function () { self.draw(); });
    this.resized.observe(host);
  }

  AllHeads.prototype.show = function (frame, shared) {
    var self = this;
    this.shared = shared;
    if (this.data && this.frame === frame) { this.draw(); return; }
    this.frame = frame;
    fetch(this.facts.all + frame + "?v=" + this.facts.version).then(function (answer) { return answer.arrayBuffer(); }).then(function (buffer) {
      if (self.frame !== frame) return;
      var tile = HS.tiles.decode(buffer);
      self.data = Float32Array.from(tile.codes, function (code) { return HS.tiles.VALUE[code] * tile.scale; });
      self.draw();
    });
  };

  AllHeads.prototype.draw = function () {
    if (!this.data || !this.host.clientWidth) return;
    var facts = this.facts, heads = facts.heads, layers = facts.layers.length, patches = facts.grid[0] * facts.grid[1], gap = 3, left = 30, top = 18;
    // a few heads take the width there is, as long as all layers stay on the screen
    var widest = Math.max(120, Math.min(240, Math.floor((0.8 * window.innerHeight) / layers)));
    var room = this.host.clientWidth - left, cell = Math.max(Math.min(Math.floor(room / heads) - gap, widest), 14), tall = Math.round((cell * facts.grid[0]) / facts.grid[1]);
    var ratio = window.devicePixelRatio || 1, width = left + heads * (cell + gap), height = top + layers * (tall + gap);
    this.size = [cell, tall, gap, left, top];
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = width + "px";
    this.canvas.style.height = height + "px";
    var context = this.canvas.getContext("2d"), whole = most(this.data), picture = this.picture(this.frame), style = getComputedStyle(this.host);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = "11px Inter, sans-serif";
    context.fillStyle = style.color;
    context.textBaseline = "middle";
    for (var head = 0; head < heads; head++) if (cell > 18 || head % 4 === 0) { context.textAlign = "center"; context.fillText(head, left + head * (cell + gap) + cell / 2, 8); }
    for (var layer = 0; layer < layers; layer++) {
      context.textAlign = "right";
      if (tall > 12 || layer % 2 === 0) context.fillText(facts.layers[layer], left - 7, top + layer * (tall + gap) + tall / 2);
      for (head = 0; head < heads; head++) {
        var values = this.data.subarray((layer * heads + head) * patches, (layer * heads + head + 1) * patches);
        if (values[0] !== values[0]) continue;
        var x = left + head * (cell + gap), y = top + layer * (tall + gap);
        context.imageSmoothingEnabled = false;
        if (picture.complete && picture.naturalWidth) { context.filter = "grayscale(1)"; context.drawImage(picture, x, y, cell, tall); context.filter = "none"; }
        context.drawImage(heat(values, facts.grid, this.shared ? whole : most(values)), x, y, cell, tall);
      }
    }
  };

  AllHeads.prototype.at = function (event) {
    var box = this.canvas.getBoundingClientRect(), size = this.size || [1, 1, 0, 0, 0];
    var head = Math.floor((event.clientX - box.left - size[3]) / (size[0] + size[2])), layer = Math.floor((event.clientY - box.top - size[4]) / (size[1] + size[2]));
    return layer >= 0 && head >= 0 && layer < this.facts.layers.length && head < this.facts.heads ? [layer, head] : null;
  };

  AllHeads.prototype.point = function (event) {
    var at = this.at(event), facts = this.facts;
    if (!at || !this.data) { this.tip.hidden = true; return; }
    var patches = facts.grid[0] * facts.grid[1], values = this.data.subarray((at[0] * facts.heads + at[1]) * patches, (at[0] * facts.heads + at[1] + 1) * patches), number = HS.paint.plain;
    this.tip.textContent = "Layer " + facts.layers[at[0]] + " · Head " + at[1] + ": " + (facts.kind === "answer" ? number(sum(values)) + " on the picture, " : "") + "at most " + number(most(values)) + " on a patch";
    this.tip.hidden = false;
    var box = this.host.getBoundingClientRect();
    this.tip.style.transform = "translate(" + Math.min(event.clientX - box.left + 14, this.host.clientWidth - this.tip.offsetWidth) + "px," + (event.clientY - box.top + 14) + "px)";
  };

  HS.pictures = { OneHead: OneHead, AllHeads: AllHeads };

  Object.assign(window.dash_clientside.headscope, {
    picture_head: function (facts) {
      if (HS.first) HS.first.hang();
      var host = document.getElementById("pictures");
      if (host && facts && host.hsFacts !== facts.weights) { host.hsFacts = facts.weights; host.hsPictures = new OneHead(host, facts); }
      return "";
    },
    picture_all: function (facts, frame, scale) {
      if (HS.first) HS.first.hang();
      var host = document.getElementById("pictures-all");
      if (!host || !facts) return "";
      if (host.hsFacts !== facts.all) { host.hsFacts = facts.all; host.hsPictures = new AllHeads(host, facts); }
      host.hsPictures.show(Number(frame), scale === "shared");
      remember({ frame: Number(frame) || "", scale: scale === "shared" ? "shared" : "" });
      return "";
    }
  });
})();
