"""The one table of diagnostic codes. It feeds `planc explain CODE` and the docs; a code is never reused.

0xx reading · 1xx spec cross-checks · 2xx placement and memory · 3xx graph · 4xx cost and schedule ·
5xx export · 9xx our own fault.
"""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """What a code means: a short title, and what to do about it."""

    title: str
    explanation: str
    since: str = "0.1"
    status: str = "stable"


CODES: dict[str, Code] = {
    # 0xx: reading
    "PLN001": Code("file cannot be read", "The file does not exist, is a folder, or may not be read by this user."),
    "PLN002": Code("not a text file", "planc reads UTF-8 text. The byte offset of the first bad byte is given."),
    "PLN003": Code(
        "file is too large", "Specs are at most 4 MB, plans 512 MB, traffic files 2 GB; larger ones are refused."
    ),
    "PLN004": Code("malformed YAML or JSON", "The text breaks the syntax at the place shown."),
    "PLN005": Code("duplicate key", "A mapping has one key twice; YAML would silently keep the last."),
    "PLN006": Code("include cycle", "A model or cluster file names itself as its base, directly or through others."),
    "PLN007": Code(
        "unknown preset or file",
        "A model, cluster or GPU is named by a file (relative to the spec) or by a preset that ships with planc.",
    ),
    "PLN008": Code("bad override", "`--set` takes KEY=VALUE with a dotted key, such as `--set workload.batch=512`."),
    "PLN009": Code("file is nested too deeply", "At most 32 levels and 200,000 values, aliases expanded."),
    "PLN010": Code("unknown key", "The schema has no such key. `planc schema spec` prints every key."),
    "PLN011": Code("missing key", "A key that has no default is absent."),
    "PLN012": Code("wrong type", "The value has another type than the schema wants."),
    "PLN013": Code(
        "bad quantity",
        "Quantities are text with a unit: `64 GB`, `80 GiB`, `1.8 TB/s`, `400 TFLOPS`, `100 us`, `60 %`.",
    ),
    "PLN014": Code("value out of range", "The number is below or above what the key allows."),
    "PLN015": Code("not one of the choices", "The key takes one of a fixed list of words."),
    "PLN016": Code(
        "bad name", "Names are 1 to 100 printable characters on one line, without quotes, backslashes, `<` or `>`."
    ),
    "PLN017": Code("output cannot be written", "The output folder cannot be made or written; earlier output is kept."),
    "PLN018": Code("not a plan", "The file is not a plan.json of a schema this version of planc reads."),
    "PLN019": Code(
        "unknown architecture",
        "import-hf knows the architectures it lists. For another one, write the model file by hand with the named keys.",
    ),
    "PLN020": Code("field not found in config.json", "import-hf never guesses: a needed field is absent or unusable."),
    "PLN021": Code(
        "not a traffic file",
        "Traffic is read from .npz, .npy, .jsonl and .json files with one of the keys `topk_ids`, `logical_count`, "
        "`logical_expert_load`, `expert_load` and `weight`, as plain arrays of numbers; pickles are never opened.",
    ),
    "PLN022": Code(
        "unusable traffic values",
        "Loads are finite and not negative, every layer has some, and a token chooses different experts that exist.",
    ),
    "PLN023": Code(
        "traffic of another model", "The recorded layers, experts and top-k are those of the model that is planned."
    ),
    "PLN024": Code(
        "not an expert map",
        "Maps are read in the forms of SGLang, TensorRT-LLM, vLLM-Ascend and EPLB: a row of expert ids per layer "
        "(docs/formats.md). Pickles are never opened.",
    ),
    "PLN025": Code(
        "expert map of another deployment",
        "The map's layers, slots and expert ids must be those of the model and the cluster, with every expert on a GPU.",
    ),
    # 1xx: cross-checks of the spec
    "PLN101": Code("top-k exceeds the experts", "A token cannot choose more experts than a layer has."),
    "PLN102": Code("layer kinds contradict", "first_k_dense, moe_stride, moe_layers and moe must agree with layers."),
    "PLN103": Code("attention sizes contradict", "KV heads divide heads; MLA names its ranks and head parts."),
    "PLN104": Code("tp does not divide the heads", "Attention is sharded by heads, so tp divides the head count."),
    "PLN105": Code("tp leaves its NVLink domain", "A TP group lies inside one NVLink domain and divides it."),
    "PLN106": Code("degrees do not fill the cluster", "world_size = dp × pp × ep equals the cluster's GPUs."),
    "PLN107": Code(
        "degree does not divide", "tp and expert_tp divide ep; widths are divided by the degree that shards them."
    ),
    "PLN108": Code(
        "stages do not match the layers", "Each pipeline stage holds a contiguous run of at least one layer."
    ),
    "PLN109": Code("expert groups contradict", "groups divides experts, and top_groups is between 1 and groups."),
    "PLN110": Code("no peak FLOPS for the dtype", "The GPU gives no peak for the dtype the model computes in."),
    "PLN111": Code("options exclude each other", "The two options named cannot hold together."),
    # 2xx: placement and memory
    "PLN201": Code("memory overflow", "A rank needs more bytes than its GPU has; the itemised sum is shown."),
    "PLN202": Code("more experts than slots", "on_overflow: error rejects a plan whose experts exceed the slots."),
    "PLN203": Code(
        "relaxed expert rule", "More experts than slots: a rank runs its experts one after another, in rounds."
    ),
    "PLN204": Code("no degrees fit", "No combination of the degrees left on auto satisfies the rule and memory."),
    "PLN205": Code("not large EP", "Large EP means ep ≥ 16."),
    "PLN206": Code("batch is padded", "Every TP group runs the same number of tokens, so the batch is rounded up."),
    "PLN207": Code("size is padded", "A width is rounded up to a multiple of the degree that shards it."),
    "PLN208": Code("figure left out", "A figure of every op would be too large to open; redraw a part with filters."),
    "PLN210": Code("planning was interrupted", "Ctrl-C ended the search; the best placement found so far is returned."),
    "PLN211": Code("slots stay empty", "Engines load maps whose slots are all filled; choose copies that fill them."),
    "PLN212": Code("something was assumed", "A cluster without a model does not say how wide tokens are or who gates."),
    # 3xx: the graph
    "PLN301": Code("cycle among blocks", "The quotient graph of op blocks has a cycle, so the plan cannot run."),
    "PLN302": Code("cycle among ops", "The expanded graph has a cycle, so the plan cannot run."),
    "PLN303": Code("op is not connected", "Every op is reachable from the input and reaches the output."),
    "PLN304": Code("shapes do not match", "An edge's shape differs from what its ends write and read."),
    "PLN305": Code("dtypes do not match", "An edge's dtype differs from what its ends write and read."),
    "PLN306": Code("layouts do not match", "An edge's layout differs from what its ends write and read."),
    "PLN307": Code("partial sum misused", "A partial sum is reduced exactly once before anything else reads it."),
    "PLN308": Code(
        "op on the wrong GPUs", "Every op runs on the ranks that its kind has in the mesh; a collective on its group."
    ),
    "PLN309": Code("communication marked wrongly", "An edge is communication exactly when its ends' ranks differ."),
    "PLN310": Code("expert rule broken", "A rank holds more experts than the rule allows, or two copies of one."),
    "PLN311": Code("expert without a copy", "Every expert of every layer has at least one copy in every replica."),
    "PLN312": Code("graph contradicts placement", "An expert op runs on a rank that does not hold that expert."),
    "PLN313": Code(
        "tokens are not conserved", "Every dispatched token reaches top_k experts and comes back top_k times."
    ),
    "PLN314": Code(
        "op does not match its kind",
        "An op's ports, or the ops that feed them, are not those that its kind has in its layer.",
    ),
    "PLN315": Code("memory table is wrong", "The plan's memory table differs from what its placement needs."),
    "PLN316": Code("file differs from the plan", "A figure or document no longer says what plan.json says."),
    "PLN317": Code("duplicate op or edge", "Op names are unique, a rank runs a block once, and an edge exists once."),
    "PLN318": Code(
        "certificate is wrong",
        "What the plan says of its placement does not follow from its placement and its traffic.",
    ),
    # 4xx: cost and schedule
    "PLN401": Code(
        "fit is incomplete", "A fit file fits every family of ops, or lists it under `absent`, and never both."
    ),
    "PLN402": Code(
        "fit is not monotone",
        "Ranges of sizes run upwards, and an interval holds 1 and is wider outside the fitted sizes than inside.",
    ),
    "PLN403": Code(
        "no price for the op", "Neither a fit of this GPU nor its spec says how long the op takes; no other GPU's does."
    ),
    "PLN404": Code(
        "not a list of ops",
        "A CSV with one header line: `kind`, `dtype`, and the columns that its kinds need (docs/formats.md).",
    ),
    "PLN405": Code(
        "unusable op", "Every op has a known kind and dtype, and the sizes of its kind as numbers of at least 1."
    ),
    "PLN406": Code(
        "unusable option of a prediction",
        "A sweep is `KEY=VALUES`, a bound a time with its unit, a straggler `WHAT=FACTOR` (`planc estimate --help`).",
    ),
    "PLN407": Code(
        "no batch keeps the bounds",
        "Every batch that fits memory exceeds the TPOT or TTFT asked for; the nearest is shown with its floor.",
    ),
    "PLN408": Code("fit of another GPU", "A fit prices the GPU that its file names and no other."),
    "PLN410": Code("no gate", "A dense model has no experts, and so no gate whose loads could be balanced."),
    "PLN411": Code(
        "router scores are made up",
        "A recording has what was chosen or how often, not by which scores. Scores are made up so that experts are chosen "
        "as often as recorded; loads follow the recording, what a bias costs does not.",
    ),
    "PLN412": Code(
        "the model's gate has no bias",
        "Without `gate_bias` in the model, engines add no bias when they choose experts; the result is what one would do.",
    ),
    "PLN420": Code(
        "needs torch",
        "Proving a plan by real processes goes through torch.distributed: `pip install 'planc[prove]'`, or a CPU build of "
        "torch (docs/prove.md). Without torch the plan is proved in one process.",
    ),
    "PLN421": Code(
        "plan computes something else",
        "Run on small numbers, an op of the plan's graph does not give what the model run whole gives, or cannot run at all.",
    ),
    "PLN422": Code(
        "proof is not this plan's", "What a plan's file says of its proof is what executing it again gives."
    ),
    "PLN430": Code(
        "no plan keeps the bounds",
        "Of all plans in the declared space none keeps the bounds of TPOT, TTFT or TPS that were asked for, or none fits memory; "
        "the nearest is shown with the bound that binds.",
    ),
    "PLN431": Code(
        "needs Dask",
        "Candidates are evaluated on a Dask cluster through the package distributed: `pip install 'planc[dask]'`. "
        "The processes of one machine (`--workers`) need no package.",
    ),
    "PLN432": Code(
        "needs plotly",
        "The interactive page of a search result holds plotly.js, which the package plotly brings: "
        "`pip install 'planc[charts]'`. Tables, JSON and SVG figures never need it.",
    ),
    "PLN433": Code(
        "worker processes keep dying",
        "A worker that dies is replaced, and its candidates are evaluated again; after several deaths in a row without a "
        "result the search gives up. Most often memory is short: fewer workers need less of it.",
    ),
    "PLN434": Code(
        "Dask cluster cannot be reached",
        "A Dask cluster is named by the address of its scheduler, such as `tcp://10.0.0.1:8786`. It needs workers, and they "
        "need planc in the same version as here.",
    ),
    "PLN435": Code(
        "constraints contradict each other", "What is asked of a search cannot be true of any plan at once."
    ),
    "PLN436": Code(
        "declared space is empty", "No combination of the axes of a search is legal for the model and the cluster."
    ),
    "PLN437": Code(
        "result of another search", "A search goes on from the result of the same spec only, overrides included."
    ),
    "PLN438": Code("not the result of a search", "The file that `planc search -o` writes, schema `planc.search/1`."),
    # 5xx: output in other formats
    "PLN501": Code("needs the dot program", "PNG and PDF are drawn by Graphviz's `dot`; SVG and DOT never need it."),
    "PLN502": Code("no such export", "`planc export --list` tells the targets and what each of them can express."),
    "PLN503": Code(
        "target cannot express this plan",
        "An export that meant another plan would be worse than none. The hint is the smallest change of the spec after which "
        "the target can say what the plan says.",
    ),
    "PLN504": Code(
        "checkpoint is not of this permutation",
        "Every layer of a permutation has a router and all of its experts in the checkpoint, with one row or tensor an expert.",
    ),
    "PLN505": Code(
        "damaged safetensors file",
        "A safetensors file is an 8-byte length, a JSON header and the tensors it lists, without gaps. Download it again.",
    ),
    "PLN506": Code(
        "too little disk for the checkpoint",
        "A relabelled checkpoint is a copy: it takes as many bytes as the old one.",
    ),
    "PLN507": Code(
        "not a permutation of the experts",
        "Every expert has one new index, and a gate that limits groups needs old groups as whole new ones.",
    ),
    "PLN508": Code(
        "not a Chakra trace that can be replayed",
        "Nodes have ids of their own and depend on nodes of their rank without a circle, and every member of a group makes the "
        "same collectives in the same order.",
    ),
    "PLN510": Code(
        "needs pyarrow",
        "Parquet files are written by the package pyarrow: `pip install 'planc[parquet]'`. The target `csv` has the same tables "
        "and needs no package.",
    ),
    # 9xx: our own fault
    "PLN900": Code("internal fault", "A fault in planc itself. Please report it with the spec that caused it."),
}
