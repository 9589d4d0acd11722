/* Drag Q: training on two images, seen in the plane of their two outputs.

   A step moves the outputs f by -eta Q (f - y); a method is its Q. For two images of
   norm 1 and an infinitely wide ReLU network Q is a closed form in 2 x 2 matrices; for
   a network of some width the same few lines run on that network's own signals.

   Every <div class="dragq"> of the page becomes a figure. Its data-* attributes choose
   what is offered (see OPTIONS). element.dragq gives the numbers behind it:
   compute(settings), train(settings), network(width, depth, seed) and settings. */
(() => {
  "use strict";

  // --- 2 x 2 matrices, [[a, b], [c, d]] ---------------------------------------------

  const N = 2; // images, with one output each
  const diag = g => [
    [g[0], 0],
    [0, g[1]],
  ];
  const each = (P, R, op) => P.map((row, i) => row.map((p, j) => op(p, R[i][j])));
  const plus = (P, R) => each(P, R, (p, r) => p + r);
  const hadamard = (P, R) => each(P, R, (p, r) => p * r);
  const shifted = (P, s) => plus(P, diag([s, s]));
  const apply = (P, v) => P.map(row => row[0] * v[0] + row[1] * v[1]);
  const transposed = P => [
    [P[0][0], P[1][0]],
    [P[0][1], P[1][1]],
  ];
  const product = (P, R) => transposed(transposed(R).map(column => apply(P, column)));
  const minus = (v, w) => [v[0] - w[0], v[1] - w[1]];
  const size = v => Math.hypot(v[0], v[1]);

  /* Of a symmetric matrix; of one of rank one the pseudo-inverse. */
  function inverse([[a, b], [c, d]]) {
    const det = a * d - b * c,
      trace = a + d;
    if (Math.abs(det) > 1e-14 * trace * trace)
      return [
        [d / det, -b / det],
        [-c / det, a / det],
      ];
    return [
      [a, b],
      [c, d],
    ].map(row => row.map(x => x / (trace * trace)));
  }

  /* x with M x = b, for a matrix of any size: Gauss, with pivots. */
  function solve(M, b) {
    M = M.map((row, i) => [...row, b[i]]);
    for (let i = 0; i < b.length; i++) {
      let best = i;
      for (let k = i; k < b.length; k++)
        if (Math.abs(M[k][i]) > Math.abs(M[best][i])) best = k;
      [M[i], M[best]] = [M[best], M[i]];
      for (let k = 0; k < b.length; k++) {
        if (k === i) continue;
        const factor = M[k][i] / M[i][i];
        for (let j = i; j <= b.length; j++) M[k][j] -= factor * M[i][j];
      }
    }
    return M.map((row, i) => row[b.length] / row[i]);
  }

  // --- Factors, methods, Q ----------------------------------------------------------

  /* [{A, B}], one a layer, of an infinitely wide ReLU network (NTK scaling, weight
     variance 2) on two inputs of norm 1 in the plane. */
  function analytic(cosine, depth) {
    const A = [],
      slopes = [];
    for (let l = 0; l < depth; l++) {
      const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
      A.push([
        [1, cosine],
        [cosine, 1],
      ]);
      slopes.push((Math.PI - angle) / Math.PI);
      cosine = (Math.sin(angle) + (Math.PI - angle) * cosine) / Math.PI;
    }
    let B = [
      [1, 1],
      [1, 1],
    ];
    const factors = [];
    for (let l = depth - 1; l >= 0; l--) {
      if (l < depth - 1)
        B = hadamard(B, [
          [1, slopes[l]],
          [slopes[l], 1],
        ]);
      factors.unshift({ A: A[l], B });
    }
    return factors;
  }

  const gram = ({ A, B }) => hadamard(A, B);
  const kernel = factors => factors.map(gram).reduce(plus);

  /* A method takes factors, damping rho and residual g to one small matrix V a layer:
     the layer moves along D^T V H, its outputs by the diagonal of B V A. */
  const MOVES = {
    gd: (factors, rho, g) => factors.map(() => diag(g.map(x => x / N))),
    exact(factors, rho, g) {
      const v = apply(inverse(shifted(kernel(factors), N * rho)), g);
      return factors.map(() => diag(v));
    },
    "block-diagonal": (factors, rho, g) =>
      factors.map(f => diag(apply(inverse(shifted(gram(f), N * rho)), g))),
    "block-tridiagonal": (factors, rho, g) =>
      (rho ? coupled : shared)(factors, rho, g).map(diag),
    "k-fac": (factors, rho, g) =>
      factors.map(({ A, B }) => {
        const inverses = [B, A].map(P => inverse(shifted(P, N * Math.sqrt(rho))));
        const V = product(product(inverses[0], diag(g)), inverses[1]);
        return V.map(row => row.map(x => N * x));
      }),
  };

  /* Block tri-diagonal, damped: sum over neighbours K_l' v_l' + N rho v_l = g. */
  function coupled(factors, rho, g) {
    const grams = factors.map(gram),
      M = [];
    for (let l = 0; l < grams.length; l++)
      for (let i = 0; i < N; i++)
        M.push(
          grams.flatMap((K, m) =>
            K[i].map(
              (k, j) =>
                (Math.abs(l - m) < 2 ? k : 0) + (l === m && i === j ? N * rho : 0),
            ),
          ),
        );
    const v = solve(
      M,
      grams.flatMap(() => g),
    );
    return grams.map((_, l) => v.slice(N * l, N * l + N));
  }

  /* Undamped: x with T x = 1, shortest, and for L = 3s + 2 the null vector (1, -1, 0,
     1, -1, ...), which makes the step as short as can be. */
  function shared(factors, rho, g) {
    const rest = factors.length % 3,
      inverses = factors.map(f => inverse(gram(f)));
    const x = factors.map((_, l) =>
      rest === 2 ? (l % 3 < 2 ? 0.5 : 0) : l % 3 === (rest ? 0 : 1) ? 1 : 0,
    );
    const null_ = factors.map((_, l) => (rest === 2 ? [1, -1, 0][l % 3] : 0));
    let z = [0, 0];
    if (rest === 2) {
      const scale = (P, s) => P.map(row => row.map(p => s * p));
      const M = inverses.map((P, l) => scale(P, null_[l] ** 2)).reduce(plus);
      const b = inverses.map((P, l) => scale(P, -null_[l] * x[l])).reduce(plus);
      z = solve(M, apply(b, g));
    }
    return inverses.map((P, l) =>
      apply(
        P,
        g.map((gi, i) => x[l] * gi + null_[l] * z[i]),
      ),
    );
  }

  /* The 2 x 2 matrix Q of a method: where it sends each of the two unit residuals. */
  function coefficient(method, factors, rho) {
    const columns = [
      [1, 0],
      [0, 1],
    ].map(g => {
      const moved = [0, 0];
      MOVES[method](factors, rho, g).forEach((V, l) => {
        const P = product(product(factors[l].B, V), factors[l].A);
        for (let n = 0; n < N; n++) moved[n] += P[n][n];
      });
      return moved;
    });
    return transposed(columns);
  }

  const factorsOf = s => analytic(s.cosine, s.depth);
  const qOf = s => coefficient(s.method, factorsOf(s), s.damping);

  /* Both images count alike, so Q = [[p, q], [q, p]]: its directions are (1, 1),
     "together", and (1, -1), "apart". */
  const spectrum = Q => [Q[0][0] + Q[0][1], Q[0][0] - Q[0][1]];

  /* The step that leaves least of the slower direction. */
  function bestStep([together, apart]) {
    if (together > 0 && apart > 0) return 2 / (together + apart);
    return 1 / Math.max(Math.abs(together), Math.abs(apart));
  }

  /* Everything the figure shows of one method, as numbers. settings: method, depth,
     cosine, damping, start, star, steps, and either eta or step (in units of the best
     constant one). */
  function compute(settings) {
    const Q = qOf(settings),
      values = spectrum(Q),
      best = bestStep(values);
    const eta = settings.eta ?? settings.step * best;
    const path = [settings.start];
    for (let t = 0; t < settings.steps; t++) {
      const move = apply(Q, minus(path[t], settings.star));
      path.push(path[t].map((f, i) => f - eta * move[i]));
    }
    const ellipse = Array.from({ length: 73 }, (_, k) =>
      apply(Q, [Math.cos((k * Math.PI) / 36), Math.sin((k * Math.PI) / 36)]),
    );
    const factors = values.map(q => Math.abs(1 - eta * q));
    const toOne = stepsTo(minus(settings.start, settings.star), factors);
    return { Q, values, best, eta, path, ellipse, factors, stepsTo1Percent: toOne };
  }

  /* Steps until a hundredth of the error is left; Infinity: never. */
  function stepsTo([r1, r2], [together, apart]) {
    const a = (r1 + r2) ** 2,
      b = (r1 - r2) ** 2;
    for (let t = 0, u = 1, v = 1; t < 100000; t++, u *= together ** 2, v *= apart ** 2)
      if (a * u + b * v <= 1.000001e-4 * (a + b)) return t;
    return Infinity;
  }

  // --- A real network ---------------------------------------------------------------

  /* Gaussian weights, the same for the same seed: mulberry32 and Box-Muller. */
  function gaussian(seed) {
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return () =>
      Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }

  const SEED = 0;

  /* Weights of a ReLU network 2 - width - ... - width - 1, rows x columns a layer. */
  function network(width, depth, seed) {
    const draw = gaussian(1000003 * seed + 7 * depth + width);
    return Array.from({ length: depth }, (_, l) => {
      const rows = l < depth - 1 ? width : 1,
        columns = l ? width : 2;
      return { rows, columns, W: Float64Array.from({ length: rows * columns }, draw) };
    });
  }

  /* W x, for W by rows; and W^T y. */
  function times({ rows, columns, W }, x) {
    const y = new Float64Array(rows);
    for (let o = 0, k = 0; o < rows; o++) {
      let sum = 0;
      for (let i = 0; i < columns; i++, k++) sum += W[k] * x[i];
      y[o] = sum;
    }
    return y;
  }

  function timesTransposed({ rows, columns, W }, y) {
    const x = new Float64Array(columns);
    for (let o = 0, k = 0; o < rows; o++)
      for (let i = 0; i < columns; i++, k++) x[i] += W[k] * y[o];
    return x;
  }

  /* Outputs, and of every layer the inputs H (with their scale) and the outputs'
     gradients at its pre-activations D, one array an image. */
  function signals(layers, inputs) {
    const depth = layers.length,
      H = layers.map(() => []),
      D = layers.map(() => []);
    const scale = layers.map(({ columns }) => Math.sqrt(2 / columns));
    const outputs = inputs.map((x, n) => {
      let h = Float64Array.from(x);
      for (let l = 0; l < depth; l++) {
        for (let i = 0; i < h.length; i++) h[i] *= scale[l];
        H[l][n] = h;
        h = times(layers[l], h);
        if (l < depth - 1) for (let i = 0; i < h.length; i++) if (!(h[i] > 0)) h[i] = 0;
      }
      D[depth - 1][n] = Float64Array.of(1);
      for (let l = depth - 1; l > 0; l--) {
        const d = timesTransposed(layers[l], D[l][n]),
          inner = H[l][n];
        for (let i = 0; i < d.length; i++) d[i] = inner[i] > 0 ? scale[l] * d[i] : 0;
        D[l - 1][n] = d;
      }
      return h[0];
    });
    return { outputs, H, D };
  }

  function dot(x, y) {
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] * y[i];
    return sum;
  }

  const inner = X => X.map(x => X.map(y => dot(x, y)));

  /* Whether an iterate has arrived, or has left for good. */
  const gone = (f, start, star) =>
    !(size(minus(f, star)) > 0.003 * size(minus(start, star)) && size(f) < 20);

  /* Train a network of settings.width on the two images from settings.start to
     settings.star: outputs are counted from where the network's own ones began. */
  function train(settings) {
    const { method, depth, width, cosine, damping, start, star, steps } = settings;
    const eta = settings.eta ?? settings.step * bestStep(spectrum(qOf(settings)));
    const inputs = [
        [1, 0],
        [cosine, Math.sqrt(1 - cosine * cosine)],
      ],
      path = [start];
    const layers = network(width, depth, SEED);
    let now = signals(layers, inputs);
    const first = now.outputs;
    for (let t = 0; t < steps; t++) {
      const factors = layers.map((_, l) => ({
        A: inner(now.H[l]),
        B: inner(now.D[l]),
      }));
      const V = MOVES[method](factors, damping, minus(path[t], star));
      layers.forEach((layer, l) => descend(layer, eta, now.D[l], V[l], now.H[l]));
      now = signals(layers, inputs);
      path.push(now.outputs.map((f, n) => f - first[n] + start[n]));
      if (gone(path[t + 1], start, star)) break;
    }
    return path;
  }

  /* W <- W - eta D^T V H */
  function descend({ rows, columns, W }, eta, D, V, H) {
    V.forEach((v, n) => {
      const d = D[n],
        h = new Float64Array(columns);
      for (let i = 0; i < columns; i++) h[i] = eta * (v[0] * H[0][i] + v[1] * H[1][i]);
      for (let o = 0, k = 0; o < rows; o++) {
        if (!d[o])
          k += columns; // a unit that is off
        else for (let i = 0; i < columns; i++, k++) W[k] -= d[o] * h[i];
      }
    });
  }

  // --- What is offered --------------------------------------------------------------

  const NAMES = {
    gd: "gradient descent",
    exact: "exact natural gradient",
    "block-diagonal": "block-diagonal",
    "block-tridiagonal": "block tri-diagonal",
    "k-fac": "K-FAC",
  };
  const WIDTHS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];
  const RHOS = [0, ...Array.from({ length: 21 }, (_, k) => 10 ** (k / 4 - 4))];
  const OPTIONS = {
    methods: "gd exact block-diagonal k-fac",
    controls: "method likeness step damping width", // and depth
    method: "exact",
    depth: "2",
    likeness: "0.9",
    step: "0.9",
    damping: "0",
    width: "",
    unit: "best", // of the step: "best" constant one of each method, or plain "eta"
    compare: "gd", // drawn in grey beside the method; "none" for alone
    start: "-1.3 0.2",
    star: "0.7 -0.6",
  };

  /* The digits 4 and 9 that are shown: two of MNIST's that share next to no pixel. The
     second is blended into the first until their cosine is the one asked for. */
  const DIGITS = [
    ".....bfa............ ....................",
    "....4efa..........1a ....................",
    "....8fb3.........1cf .........15efb6.....",
    "..17f8...........2ff .......18ed87ef2....",
    "..9ff3...........2fa ......2ce9...af3....",
    ".7ff8............8f8 ......ae3....ae2....",
    ".cfb.............9f2 .....4f8.....b9.....",
    "7fc1.............ff2 .....bb.....1f7.....",
    "ef5..............ff2 ....7f6.....8f7.....",
    "fb...............ff2 ....8e2....3ef3.....",
    "ff4.............5ff2 ....8f4...3dfd1.....",
    "8f91............6ff2 ....3ee868fffa......",
    "1cfb2.......1248cfe2 .....3cfff81c7......",
    ".4cfec86666cdefbef8. ......1222..ca......",
    "...6dfffffba751.cd.. ............ca......",
    ".....49bb4.....3ed.. ............cc......",
    "...............4fd.. ............cf1.....",
    "...............4fd.. ............cf1.....",
    "...............6fb.. ............af1.....",
    "...............3e4.. ............6f1.....",
    ".................... ............6f1.....",
    ".................... ............2b1.....",
  ];
  const [FOUR, NINE] = [0, 1].map(k => {
    const pixels = DIGITS.flatMap(row =>
      [...row.split(" ")[k]].map(x => parseInt(x, 16) || 0),
    );
    const norm = Math.hypot(...pixels);
    return pixels.map(x => x / norm);
  });
  const ALIKE = FOUR.reduce((sum, x, i) => sum + x * NINE[i], 0);

  /* The second image at a cosine, as a picture: black ink on nothing. */
  function picture(cosine) {
    const across = Math.sqrt((1 - cosine * cosine) / (1 - ALIKE * ALIKE));
    const pixels = FOUR.map((x, i) => cosine * x + across * (NINE[i] - ALIKE * x));
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 22;
    const context = canvas.getContext("2d"),
      image = context.createImageData(22, 22);
    const top = Math.max(...pixels);
    pixels.forEach((x, i) => {
      const at = 4 * (22 * Math.floor(i / 20) + (i % 20) + 1);
      image.data[at + 3] = (255 * Math.max(0, x)) / top;
    });
    context.putImageData(image, 0, 0);
    return canvas.toDataURL();
  }

  const short = x => (x >= 100 ? x.toFixed(0) : Number(x.toPrecision(2)).toString());
  const count = ({ stepsTo1Percent: n }) => (n === Infinity ? "never" : String(n));
  const inSteps = result =>
    ({ never: "it never arrives", 1: "1 step" })[count(result)] ??
    `${count(result)} steps`;
  const Name = ({ method }) =>
    ({ exact: "The natural gradient" })[method] ??
    NAMES[method][0].toUpperCase() + NAMES[method].slice(1);
  const ratio = ({ values }) => {
    const [small, great] = values.map(Math.abs).sort((a, b) => a - b);
    return great / small;
  };
  const isCircle = result => ratio(result) < 1.01;

  /* Things to try: what the button says, what it sets, and what is then to be seen of
     the methods drawn, [before, after] each. */
  const TRIES = [
    {
      needs: "likeness",
      say: "More alike images",
      set: ["likeness", 0.98],
      see: results =>
        results.map(([before, after]) =>
          count(before) === count(after)
            ? `${Name(after)} does not notice: ${inSteps(after)}.`
            : `${Name(after)} slows down: ${inSteps(after)}, before ${count(before)}.`,
        ),
    },
    {
      needs: "step",
      say: "Half the step",
      set: ["step", 0.5],
      see: results =>
        results.map(([, after]) =>
          isCircle(after)
            ? `${Name(after)} covers half of what is left at each step, straight.`
            : `${Name(after)} overshoots less one way, and creeps the other.`,
        ),
    },
    {
      needs: "step",
      say: "Step too far",
      set: ["step", 1.25],
      see: results =>
        results.map(([, after]) =>
          Math.max(...after.factors) >= 1
            ? `${Name(after)} runs away: a bar is past 1, that error grows.`
            : `${Name(after)} overshoots, and comes back.`,
        ),
    },
    {
      needs: "damping",
      say: "Damping",
      set: ["damping", 1],
      see: results =>
        results
          .filter(([, after]) => after.method !== "gd")
          .map(
            ([, after]) =>
              `Damping turns Q towards gradient descent's needle: ` +
              `${Name(after)[0].toLowerCase()}${Name(after).slice(1)} bends.`,
          ),
    },
    {
      needs: "width",
      say: "Narrow net",
      set: ["width", 32],
      see: () => [
        "The line is an infinitely wide network. The rings are a real one, " +
          "trained here: its Q moves with its weights, and it leaves the line.",
      ],
    },
  ];

  // --- Drawing ----------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";

  function node(parent, tag, attributes = {}, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes))
      made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  /* The class with a method's colour. */
  const colour = method => `dq-${method}`;

  const points = list => list.map(p => p.map(x => x.toFixed(2)).join(",")).join(" ");

  function arrow(parent, from, to, kind) {
    const d = minus(to, from),
      length = size(d);
    if (!(length > 3)) return;
    const [x, y] = d.map(v => v / length),
      head = Math.min(10, length);
    const foot = [to[0] - head * x, to[1] - head * y];
    const wing = side => [
      foot[0] - side * head * 0.45 * y,
      foot[1] + side * head * 0.45 * x,
    ];
    const line = [from[0], from[1], foot[0], foot[1]].map(v => v.toFixed(2));
    node(parent, "path", {
      class: `dq-line ${kind}`,
      d: `M${line[0]},${line[1]} L${line[2]},${line[3]}`,
    });
    node(parent, "polygon", {
      class: `dq-fill ${kind}`,
      points: points([to, wing(1), wing(-1)]),
    });
  }

  /* The directions "together" and "apart", dotted through a point. */
  function ways(parent, [x, y], far) {
    for (const sign of [1, -1]) {
      const ends = [-far, far].map(s => [x + s, y - sign * s]);
      node(parent, "polyline", { class: "dq-ways", points: points(ends) });
    }
  }

  const STAR = points(
    Array.from({ length: 10 }, (_, k) => {
      const radius = k % 2 ? 5.6 : 13.5,
        angle = (k * Math.PI) / 5;
      return [radius * Math.sin(angle), -radius * Math.cos(angle)];
    }),
  );

  const PLANE = { left: 44, top: 8, side: 388, reach: 2 };
  const toPlane = f => {
    const unit = PLANE.side / (2 * PLANE.reach);
    return [
      PLANE.left + (f[0] + PLANE.reach) * unit,
      PLANE.top + (PLANE.reach - f[1]) * unit,
    ];
  };
  const fromPlane = p => {
    const unit = PLANE.side / (2 * PLANE.reach);
    const limit = x => Math.max(-1.95, Math.min(1.95, Math.round(100 * x) / 100));
    return [
      limit((p[0] - PLANE.left) / unit - PLANE.reach),
      limit(PLANE.reach - (p[1] - PLANE.top) / unit),
    ];
  };

  let figures = 0;

  class Figure {
    constructor(element) {
      this.element = element;
      this.id = `dragq-${++figures}`;
      const option = name => element.dataset[name] ?? OPTIONS[name];
      this.methods = option("methods").split(/\s+/);
      this.controls = option("controls").split(/\s+/);
      this.compare = option("compare");
      this.unit = option("unit");
      const pair = name => option(name).split(/\s+/).map(Number);
      this.initial = {
        method: option("method"),
        depth: Number(option("depth")),
        likeness: Number(option("likeness")),
        step: Number(option("step")),
        damping: Number(option("damping")),
        width: Number(option("width")) || Infinity,
        start: pair("start"),
        star: pair("star"),
      };
      if (!this.methods.includes(this.initial.method))
        this.initial.method = this.methods[0];
      this.state = { ...this.initial };
      this.build();
      const figure = this;
      element.dragq = {
        compute,
        train,
        network,
        get settings() {
          return figure.settings(figure.state.method);
        },
      };
      this.sync();
      this.draw();
    }

    /* What compute() takes. */
    settings(method) {
      const { depth, likeness, step, damping, width, start, star } = this.state;
      const size_ = this.unit === "eta" ? { eta: step } : { step };
      return {
        method,
        depth,
        cosine: likeness,
        damping,
        width,
        start,
        star,
        steps: 400,
        ...size_,
      };
    }

    widths() {
      return WIDTHS.filter(width => this.state.depth < 3 || width <= 256);
    }

    // --- The skeleton

    build() {
      const { element } = this;
      element.querySelectorAll(".dragq-static").forEach(part => part.remove());
      element.setAttribute("role", "group");
      element.setAttribute(
        "aria-label",
        "Interactive figure: training in the plane of two outputs",
      );
      const body = document.createElement("div");
      body.className = "dq";
      body.innerHTML = `
        <p class="dq-head" aria-live="polite"></p>
        <div class="dq-main">
          <svg class="dq-plane" viewBox="0 0 440 440" role="group"
            aria-label="Plane of the outputs on the two images"></svg>
          <div class="dq-hands">
            <div class="dq-controls"></div>
            <div class="dq-try"><span>Drag the start or the target, or try:</span></div>
            <p class="dq-tip" aria-live="polite"></p>
          </div>
          <div class="dq-side">
            <div><p class="dq-title">The unit circle under <i>ηQ</i></p>
              <svg class="dq-ellipse" viewBox="0 0 260 222" role="img"></svg>
              <p class="dq-why"></p></div>
            <div><p class="dq-title">Error left, |1 − <i>ηq</i>|</p>
              <svg class="dq-bars" viewBox="0 0 260 124" role="img"></svg></div>
          </div>
        </div>`;
      element.append(body);
      this.part = name => body.querySelector(`.dq-${name}`);
      this.buildPlane();
      this.inputs = {};
      for (const name of this.controls) this.buildControl(name);
      this.buildTries();
    }

    buildPlane() {
      const plane = this.part("plane"),
        { left, top, side } = PLANE;
      const clip = node(node(plane, "defs"), "clipPath", { id: `${this.id}-clip` });
      const frame = { x: left, y: top, width: side, height: side };
      node(clip, "rect", frame);
      node(plane, "rect", { ...frame, class: "dq-frame" });
      const grid = node(plane, "g", { class: "dq-grid" });
      for (const k of [-1, 0, 1]) {
        const [x, y] = toPlane([k, k]);
        node(grid, "path", {
          d: `M${x},${top} v${side} M${left},${y} h${side}`,
          class: k ? "" : "dq-zero",
        });
        node(
          grid,
          "text",
          { x, y: top + side + 15, "text-anchor": "middle" },
          String(k).replace("-", "−"),
        );
        node(
          grid,
          "text",
          { x: left - 6, y: y + 4, "text-anchor": "end" },
          String(k).replace("-", "−"),
        );
      }
      const middle = left + side / 2,
        low = top + side + 29;
      node(
        grid,
        "text",
        { x: left + side - 36, y: low + 3, "text-anchor": "end", class: "dq-axis" },
        "output on image 1",
      );
      node(
        grid,
        "text",
        {
          transform: `translate(19 ${top + 34}) rotate(-90)`,
          "text-anchor": "end",
          class: "dq-axis",
        },
        "output on image 2",
      );
      const place = { width: 34, height: 34, class: "dq-image" };
      node(grid, "image", { ...place, x: left + side - 30, y: low - 21 }).setAttribute(
        "href",
        picture(1),
      );
      this.second = node(grid, "image", { ...place, x: 0, y: top - 4 });
      this.scene = node(plane, "g", { "clip-path": `url(#${this.id}-clip)` });
      this.handles = {
        start: this.buildHandle("start"),
        star: this.buildHandle("star"),
      };
    }

    /* A handle: dragged by mouse or finger, moved by the arrow keys. */
    buildHandle(name) {
      const plane = this.part("plane");
      const handle = node(plane, "g", {
        class: `dq-handle dq-${name}`,
        tabindex: 0,
        role: "slider",
        "aria-valuemin": -1.95,
        "aria-valuemax": 1.95,
        "aria-label": `${name === "start" ? "Start" : "Target"}; arrow keys move it`,
      });
      node(handle, "circle", { r: 24, class: "dq-touch" });
      node(handle, "circle", { r: 17, class: "dq-focus" });
      if (name === "start") node(handle, "circle", { r: 7.5, class: "dq-mark" });
      else node(handle, "polygon", { points: STAR, class: "dq-mark" });
      const label = name === "start" ? "start" : "target";
      node(handle, "text", { y: -18, "text-anchor": "middle" }, label);
      const move = event => {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
          plane.getScreenCTM().inverse(),
        );
        this.change({ [name]: fromPlane([at.x, at.y]) });
      };
      handle.addEventListener("pointerdown", event => {
        handle.setPointerCapture(event.pointerId);
        handle.focus({ preventScroll: true });
        event.preventDefault();
      });
      // or the page scrolls: touch-action in CSS does not hold for parts of an SVG
      const still = event => event.preventDefault();
      handle.addEventListener("touchstart", still, { passive: false });
      handle.addEventListener("pointermove", event => {
        if (handle.hasPointerCapture(event.pointerId)) move(event);
      });
      handle.addEventListener("keydown", event => {
        const way = {
          ArrowLeft: [-1, 0],
          ArrowRight: [1, 0],
          ArrowUp: [0, 1],
          ArrowDown: [0, -1],
        }[event.key];
        if (!way) return;
        event.preventDefault();
        const stride = event.shiftKey ? 0.01 : 0.1;
        const to = this.state[name].map((x, i) => x + stride * way[i]);
        this.change({ [name]: fromPlane(toPlane(to)) });
      });
      return handle;
    }

    buildControl(name) {
      const label = document.createElement("label");
      label.className = `dq-control dq-control-${name}`;
      const words = {
        method: "Method",
        likeness: "Likeness",
        step: "Step",
        damping: "Damping",
        width: "Network width",
        depth: "Depth",
      };
      label.innerHTML =
        `<span class="dq-name">${words[name]}</span>` +
        `<span class="dq-value"></span>`;
      const input = document.createElement(name === "method" ? "select" : "input");
      if (name === "method") {
        for (const method of this.methods) input.add(new Option(NAMES[method], method));
      } else {
        const ranges = {
          likeness: [0.05, 0.99, 0.01],
          step: [0.05, 2, 0.05],
          damping: [0, RHOS.length - 1, 1],
          width: [0, WIDTHS.length, 1],
          depth: [1, 8, 1],
        };
        input.type = "range";
        [input.min, input.max, input.step] = ranges[name];
      }
      input.addEventListener("input", () => this.change({ [name]: this.read(name) }));
      label.append(input);
      this.part("controls").append(label);
      this.inputs[name] = { input, value: label.querySelector(".dq-value") };
    }

    read(name) {
      const { value } = this.inputs[name].input;
      if (name === "method") return value;
      if (name === "damping") return RHOS[value];
      if (name === "width") return this.widths()[value] ?? Infinity;
      return Number(value);
    }

    buildTries() {
      const box = this.part("try");
      for (const item of TRIES.filter(item => this.controls.includes(item.needs))) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = item.say;
        button.addEventListener("click", () => this.tryOut(item));
        box.append(button);
      }
      const reset = document.createElement("button");
      reset.type = "button";
      reset.className = "dq-reset";
      reset.textContent = "Reset";
      reset.addEventListener("click", () => this.change(this.initial));
      box.append(reset);
    }

    // --- What moves

    /* A change made by hand: the hint of the last button no longer holds. */
    change(changes) {
      cancelAnimationFrame(this.glide);
      this.part("tip").textContent = "";
      Object.assign(this.state, changes);
      this.sync();
      if (!this.pending)
        this.pending = requestAnimationFrame(() => {
          this.pending = 0;
          this.draw();
        });
    }

    /* The methods that are drawn, the one compared with last. */
    results() {
      const { method } = this.state,
        { compare } = this;
      const drawn =
        compare === "none" || compare === method ? [method] : [method, compare];
      return drawn.map(name => ({ method: name, ...compute(this.settings(name)) }));
    }

    /* From the beginning glide to what a button sets, then say what is seen. */
    tryOut({ set: [name, to], see }) {
      const { start, star, method } = this.state;
      this.change({ ...this.initial, start, star, method });
      const before = this.results(),
        from = this.state[name];
      const show = value => {
        this.state[name] = value;
        this.sync();
        this.draw();
      };
      const finish = () => {
        show(to);
        const pairs = this.results().map((after, k) => [before[k], after]);
        this.part("tip").textContent = see(pairs).join(" ");
      };
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      if (still || name === "width" || name === "damping") return finish();
      const begin = performance.now();
      const frame = now => {
        const t = Math.min(1, Math.max(0, (now - begin) / 700));
        if (t === 1) return finish();
        show(from + (to - from) * t * t * (3 - 2 * t));
        this.glide = requestAnimationFrame(frame);
      };
      this.glide = requestAnimationFrame(frame);
    }

    /* Controls and handles show the state. */
    sync() {
      const { state } = this,
        widths = this.widths();
      if (state.width < Infinity && !widths.includes(state.width))
        state.width = widths.at(-1);
      const places = {
        ...state,
        damping: RHOS.reduce(
          (best, rho, k) =>
            Math.abs(rho - state.damping) < Math.abs(RHOS[best] - state.damping)
              ? k
              : best,
          0,
        ),
        width: state.width < Infinity ? widths.indexOf(state.width) : widths.length,
      };
      for (const [name, { input }] of Object.entries(this.inputs)) {
        if (name === "width") input.max = widths.length;
        input.value = places[name];
      }
      for (const [name, handle] of Object.entries(this.handles)) {
        const at = state[name],
          [x, y] = toPlane(at);
        handle.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
        handle.setAttribute("aria-valuenow", at[0].toFixed(2));
        handle.setAttribute(
          "aria-valuetext",
          `${at[0].toFixed(2)} on image 1, ${at[1].toFixed(2)} on image 2`,
        );
      }
    }

    draw() {
      const { state } = this,
        [main, grey] = this.results();
      const drawn = grey ? [grey, main] : [main];
      const real = state.width < Infinity ? this.trained() : null;
      this.drawWords(main, grey, real);
      this.drawPlane(drawn, real);
      this.drawEllipse(drawn);
      this.drawBars(grey ? [main, grey] : [main]);
      this.second.setAttribute("href", picture(Math.max(state.likeness, ALIKE)));
    }

    /* The network's path; where that takes long, once the hand has come to rest. */
    trained() {
      const settings = { ...this.settings(this.state.method), steps: 60 };
      const key = JSON.stringify(settings),
        cached = this.known?.key === key;
      clearTimeout(this.rest);
      if (cached) return this.known.path;
      if (this.slow && this.awaited !== key) {
        this.awaited = key;
        this.rest = setTimeout(() => this.draw(), 150);
        return null;
      }
      const begin = performance.now();
      this.known = { key, path: train(settings) };
      this.slow = performance.now() - begin > 50;
      return this.known.path;
    }

    drawWords(main, grey, real) {
      const word = (kind, text, number) =>
        `<span class="dq-word ${colour(kind)}">${text} <b>${number}</b></span>`;
      const words = [main, grey]
        .filter(Boolean)
        .map(result => word(result.method, NAMES[result.method], count(result)));
      if (real) {
        const { start, star, width } = this.state,
          whole = size(minus(start, star));
        const arrived = real.findIndex(f => size(minus(f, star)) <= 0.010001 * whole);
        const lost = size(real.at(-1)) < 20 ? `over ${real.length - 1}` : "never";
        words.splice(
          1,
          0,
          word(
            main.method,
            `○ network of ${width} units`,
            arrived < 0 ? lost : arrived,
          ),
        );
      }
      this.part("head").innerHTML =
        `<small>Steps until 1 % of the error is left</small>${words.join(" ")}`;
      const { state } = this,
        say = {
          likeness: `cosine ${state.likeness.toFixed(2)}`,
          step:
            this.unit === "eta"
              ? `η = ${state.step.toFixed(2)}`
              : `${state.step.toFixed(2)} × best (η ${short(main.eta)})`,
          damping: state.damping ? `ρ = ${short(state.damping)}` : "none",
          width: state.width < Infinity ? `${state.width} units` : "infinite",
          depth: `${state.depth} layer${state.depth > 1 ? "s" : ""}`,
          method: "",
        };
      for (const [name, { input, value }] of Object.entries(this.inputs)) {
        value.textContent = say[name];
        if (name !== "method") input.setAttribute("aria-valuetext", say[name]);
      }
    }

    drawPlane(drawn, real) {
      const { scene, state } = this;
      scene.replaceChildren();
      const star = toPlane(state.star);
      ways(scene, star, 600);
      for (const result of drawn) {
        const kind = colour(result.method),
          last = result === drawn.at(-1);
        const path = visible(result.path, state.star).map(toPlane);
        node(scene, "polyline", { class: `dq-path ${kind}`, points: points(path) });
        if (!(last && real))
          for (const [x, y] of path.slice(1))
            node(scene, "circle", {
              class: `dq-fill ${kind}`,
              cx: x.toFixed(2),
              cy: y.toFixed(2),
              r: last ? 4.5 : 2.8,
            });
      }
      if (!real) return;
      const path = visible(real, state.star).map(toPlane),
        kind = colour(state.method);
      node(scene, "polyline", { class: `dq-real ${kind}`, points: points(path) });
      for (const [x, y] of path.slice(1))
        node(scene, "circle", {
          class: `dq-ring ${kind}`,
          cx: x.toFixed(2),
          cy: y.toFixed(2),
          r: 5,
        });
    }

    drawEllipse(drawn) {
      const panel = this.part("ellipse"),
        centre = [130, 112],
        unit = 50;
      const to = v => [centre[0] + unit * v[0], centre[1] - unit * v[1]];
      panel.replaceChildren();
      node(panel, "circle", {
        class: "dq-limit",
        cx: centre[0],
        cy: centre[1],
        r: 2 * unit,
      });
      node(panel, "circle", {
        class: "dq-unit",
        cx: centre[0],
        cy: centre[1],
        r: unit,
      });
      node(
        panel,
        "text",
        {
          class: "dq-over",
          x: centre[0],
          y: centre[1] + 2 * unit - 7,
          "text-anchor": "middle",
        },
        "2: too far",
      );
      ways(panel, centre, Math.SQRT2 * unit);
      const r = minus(this.state.star, this.state.start),
        toward = r.map(x => x / (size(r) || 1));
      for (const { method, Q, eta, ellipse } of drawn) {
        const kind = colour(method);
        node(panel, "polygon", {
          class: `dq-shape ${kind}`,
          points: points(ellipse.map(v => to(v.map(x => eta * x)))),
        });
        arrow(panel, centre, to(apply(Q, toward).map(x => eta * x)), kind);
      }
      const [x, y] = to(toward);
      node(panel, "polygon", {
        class: "dq-mark dq-star",
        points: STAR,
        transform: `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(.6)`,
      });
      this.drawWhy(panel, [...drawn].reverse(), toward);
    }

    /* What the ellipses mean for the step, a sentence a method. */
    drawWhy(panel, drawn, toward) {
      const why = this.part("why");
      const say = ({ method, Q, values }) => {
        const line = document.createElement("span");
        line.className = `dq-say ${colour(method)}`;
        line.textContent = shape(values, turn(apply(Q, toward), toward));
        return line;
      };
      why.replaceChildren(...drawn.map(say));
      panel.setAttribute(
        "aria-label",
        drawn
          .map(
            ({ method, values }, k) =>
              `Q of ${NAMES[method]}: ${short(values[0])} for both errors together, ` +
              `${short(values[1])} apart. ${why.children[k].textContent}`,
          )
          .join(" "),
      );
    }

    drawBars(drawn) {
      const panel = this.part("bars"),
        left = 64,
        full = 150,
        top = 1.25;
      panel.replaceChildren();
      const thick = drawn.length > 1 ? 17 : 24,
        gap = 8;
      ["together", "apart"].forEach((name, way) => {
        const y0 = 4 + way * 52;
        node(
          panel,
          "text",
          { class: "dq-label", x: left - 8, y: y0 + 15, "text-anchor": "end" },
          name,
        );
        arrowPair(panel, left - 34, y0 + 26, way);
        drawn.forEach(({ method, factors }, k) => {
          const value = factors[way],
            length = (Math.min(value, top) / top) * full;
          const y = y0 + k * (thick + 3),
            kind = colour(method);
          const shown = value > 9.995 ? short(value) : value.toFixed(2);
          node(panel, "rect", {
            class: `dq-fill ${kind}`,
            x: left,
            y,
            height: thick,
            width: Math.max(1, length).toFixed(2),
            rx: 2,
          });
          node(
            panel,
            "text",
            {
              class: value > 1 ? "dq-over" : "",
              x: 258,
              y: y + thick / 2 + 4.5,
              "text-anchor": "end",
            },
            shown,
          );
        });
      });
      const x = left + full / top;
      node(panel, "path", { class: "dq-limit", d: `M${x},0 V${104}` });
      node(
        panel,
        "text",
        { class: "dq-over", x, y: 119, "text-anchor": "middle" },
        "1: never shrinks",
      );
      panel.setAttribute(
        "aria-label",
        drawn
          .map(
            ({ method, factors }) =>
              `${NAMES[method]}: ${factors[0].toFixed(2)} of the error ` +
              `together and ${factors[1].toFixed(2)} of the error apart are left`,
          )
          .join("; "),
      );
    }
  }

  /* Degrees between two vectors; NaN where one is not finite. */
  function turn(v, w) {
    const cosine = (v[0] * w[0] + v[1] * w[1]) / (size(v) * size(w));
    return Math.round((Math.acos(Math.max(-1, Math.min(1, cosine))) * 180) / Math.PI);
  }

  function shape(values, degrees) {
    if (!(Math.max(...values.map(Math.abs)) < 1e6))
      return "Singular: there is no step.";
    if (Math.min(...values) < 0) return "A negative eigenvalue: that part climbs.";
    if (isCircle({ values })) return "A circle: aims at the target.";
    const long = ratio({ values });
    const form = `${long > 2 ? "A needle" : "An ellipse"}, ${short(long)} to 1`;
    return `${form}: aims ${degrees}° off.`;
  }

  /* Two small arrows: both outputs too low, or one too low and one too high. */
  function arrowPair(parent, x, y, opposed) {
    for (const k of [0, 1]) {
      const down = opposed && k,
        at = x + 12 * k,
        tip = down ? 4 : -4;
      node(parent, "path", {
        class: "dq-sign",
        d: `M${at},${y} v12 M${at - 4},${y + (down ? 8 : 4)} l4,${tip} l4,${-tip}`,
      });
    }
  }

  /* The part of a path worth drawing. */
  function visible(path, star) {
    const end = path.findIndex(f => gone(f, path[0], star));
    return (end < 0 ? path : path.slice(0, end + 1)).filter(f => size(f) < 1e4);
  }

  function begin() {
    document
      .querySelectorAll(".dragq")
      .forEach(element => element.dragq ?? new Figure(element));
  }

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", begin);
  else begin();
})();
