/* The map as a file: PNG at three times the screen, SVG whose frame and words are vectors, JSON with the cells in sight. */
(function () {
  "use strict";
  var HS = window.headscope, paint = HS.paint, VECTOR = 10000;

  function caption(viewer) { return viewer.facts.title + " · " + viewer.words(0).join(" · "); }

  function save(blob, name) {
    var link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 4000);
  }

  function size(viewer) { return { width: Math.ceil(viewer.box.right + 10), height: Math.ceil(viewer.box.y + viewer.box.tall + 50), top: 26 }; }

  function titled(viewer, context, room) {
    context.fillStyle = viewer.colours().panel;
    context.fillRect(0, 0, room.width, room.height);
    context.fillStyle = viewer.colours().text;
    context.font = "12px " + viewer.colours().font;
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(caption(viewer), 8, 14);
  }

  HS.png = function (viewer) {
    var ratio = 3, room = size(viewer), canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    canvas.width = room.width * ratio;
    canvas.height = room.height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    titled(viewer, context, room);
    viewer.cells(context, ratio);
    paint.frame(context, viewer.frameBox(), viewer.view, viewer.colours(), viewer.domain, "");
    return new Promise(function (done) { canvas.toBlob(done, "image/png"); });
  };

  HS.svg = function (viewer) {
    var room = size(viewer), svg = new paint.Svg(room.width, room.height), box = viewer.box;
    titled(viewer, svg, room);
    var table = HS.table(viewer), count = table.rows * table.columns;
    if (count <= VECTOR && !viewer.plan) vectors(viewer, svg, table);
    else {
      var canvas = document.createElement("canvas"), ratio = 3, context = canvas.getContext("2d");
      canvas.width = Math.round(box.used * ratio);
      canvas.height = Math.round(box.tall * ratio);
      context.setTransform(ratio, 0, 0, ratio, -box.x * ratio, -box.y * ratio);
      viewer.cells(context, ratio);
      svg.image(canvas.toDataURL("image/png"), box.x, box.y, box.used, box.tall);
    }
    paint.frame(svg, viewer.frameBox(), viewer.view, viewer.colours(), viewer.domain, "");
    return svg.text();
  };

  function vectors(viewer, svg, table) {
    var domain = viewer.domain, words = viewer.colours().words, view = viewer.view, box = viewer.box, round = function (x) { return Math.round(x * 100) / 100; };
    for (var r = 0; r < table.rows; r++) {
      var most = Math.max.apply(null, table.values[r].map(function (one) { return one === null ? 0 : one; }));
      for (var c = 0; c < table.columns; c++) {
        var value = table.values[r][c], share;
        if (value === null || (table.first_key + c * table.block < viewer.hiddenKeys(table.block) * table.block)) continue;
        if (viewer.scale === "log") share = (Math.log10(Math.max(value, domain.low)) - Math.log10(domain.low)) / (Math.log10(domain.high) - Math.log10(domain.low));
        else share = value / (viewer.scale === "row" ? most || 1 : domain.high);
        var word = words[Math.min(Math.max(Math.floor(share * (words.length - 1)), 0), words.length - 1)];
        svg.fillStyle = "#" + [word & 255, (word >> 8) & 255, (word >> 16) & 255].map(function (x) { return ("0" + x.toString(16)).slice(-2); }).join("");
        var x0 = Math.max(box.x + (table.first_key + c * table.block - view.k) / view.s, box.x), x1 = Math.min(box.x + (table.first_key + (c + 1) * table.block - view.k) / view.s, box.x + box.used);
        var y0 = Math.max(box.y + (table.first_query + r * table.block - view.q) / view.s, box.y), y1 = Math.min(box.y + (table.first_query + (r + 1) * table.block - view.q) / view.s, box.y + box.tall);
        if (x1 > x0 && y1 > y0) svg.fillRect(round(x0), round(y0), round(x1 - x0), round(y1 - y0));
      }
    }
  }

  /* The cells in sight as numbers; null where no query sees a key or nothing is there yet. */
  HS.table = function (viewer) {
    var block = viewer.target.block, at = viewer.window(), r0 = Math.floor(at[0] / block), r1 = Math.ceil(at[1] / block), c0 = Math.floor(at[2] / block), c1 = Math.ceil(at[3] / block), values = [];
    for (var r = r0; r < r1; r++) {
      var row = [];
      for (var c = c0; c < c1; c++) {
        var cell = viewer.cellOf(r * block, c * block);
        row.push(cell && cell.value === cell.value ? Number(cell.value.toPrecision(4)) : null);
      }
      values.push(row);
    }
    return { head: viewer.facts.title, run: viewer.facts.run, cells: block === 1 ? "exact weights" : viewer.plane === "mass" ? "block mass per query" : "largest weight of a block", block: block, first_query: r0 * block, first_key: c0 * block, rows: r1 - r0, columns: c1 - c0, note: viewer.words(0).join(", "), values: values };
  };

  HS.save = function (viewer, kind) {
    var at = viewer.window(), name = viewer.facts.name + "-q" + at[0] + "-" + at[1] + "-k" + at[2] + "-" + at[3] + "." + kind;
    if (kind === "png") HS.png(viewer).then(function (blob) { save(blob, name); });
    else save(new Blob([kind === "svg" ? HS.svg(viewer) : JSON.stringify(HS.table(viewer))], { type: kind === "svg" ? "image/svg+xml" : "application/json" }), name);
  };
})();
