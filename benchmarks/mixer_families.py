"""What docs/mixers.md says about families of mixers; `mixer_docs.py` makes the page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A section of the page.

    Attributes:
        title: Its heading.
        names: Patterns of mixers' names, with spaces between.
        primitives: Ops whose mixers belong here where no pattern matches.
        text: What they have in common.
    """

    title: str
    names: str
    primitives: tuple[str, ...]
    text: str


FAMILIES = (
    Family(
        "Selective scans",
        "mamba mamba_* bimamba*",
        ("selective_scan", "bidirectional_selective_scan", "path_selective_scan"),
        "Mamba's recurrence: every channel has N states of its own, which decay at N fixed rates "
        "times a time step that the token chooses; the token also chooses what is written and "
        "what is read. Decays of every channel and state cannot be written as matrix products, "
        "so that a scan moves few bytes and does many exponentials. `bimamba` scans both ways "
        "over one projection and gate, as Vision Mamba does, in one call of one op.",
    ),
    Family(
        "Matrix states",
        "mamba2* mamba3* hydra retnet* rwkv5* rwkv6* gla* hgrn2* linear_att* based* phi_mamba*",
        ("gated_linear_scan", "bidirectional_gated_linear_scan", "ssd", "gated_linear_attention"),
        "A head keeps a matrix, the decayed sum of key times value, and a token reads it with its "
        "query: linear attention. They differ in the decay: none (`linear_attention`, `based`), "
        "a constant of the head (`retnet`) or of the key channel (`rwkv5`), chosen by the token "
        "for a head (`mamba2`, `mamba3`, `hydra`) or for a key channel (`rwkv6`, `gla`, "
        "`hgrn2`). In a chunk all is matrix products, so that large states are cheap on a GPU. "
        "`hydra` reads both ways and counts a token itself once, with a weight of its own; "
        "`mamba3` also rotates keys and queries by angles that add up over the tokens, which lets "
        "a state count.",
    ),
    Family(
        "Time-invariant state spaces",
        "s4* dss* s5* lru* gss* lssl* hippo* diagonal* spade*",
        ("diagonal_ssm",),
        "A linear recurrence that is the same for every token, so that it is also a convolution "
        "with a kernel as long as the sequence: run as one in training, step by step in use. "
        "Where its eigenvalues start decides what it remembers (HiPPO's matrices). `s4d`, `dss` "
        "and `s4` have a system for every channel, `s5` and `lru` one for all channels, with the "
        "smallest states of all mixers here. Nothing is selected by content, except through the "
        "gates around it.",
    ),
    Family(
        "Gated diagonal recurrences",
        "rg_lru rwkv4* hgrn* min_gru*",
        ("linear_scan", "wkv"),
        "One state a channel, whose decay the token chooses (`rg_lru`, Hawk's and Griffin's), or "
        "a running average whose weights are exponentials of the keys (`rwkv4`). The least to "
        "carry and to compute; how well they recall what was read depends on width.",
    ),
    Family(
        "Long convolutions",
        "hyena* h3* base_conv*",
        ("fft_conv",),
        "Convolutions as long as the sequence by FFT, between products of projections. `hyena` "
        "makes its kernel by a small network of the position: as long as wanted, but there is no "
        "finite state, so that a step costs as much as all that came before. `h3` has state "
        "spaces for kernels, and steps. `base_conv` is a short convolution times a projection.",
    ),
    Family(
        "Attention, and controls without a recurrence",
        "attention* local_attention* mega* gated_cnn*",
        ("sequence_attention", "causal_conv1d", "symmetric_conv1d"),
        "`attention` is softmax attention, what the others want to replace: everything that was "
        "read can be found again, and the state grows with it. `local_attention` keeps a window. "
        "`mega` puts a moving average in front of a single head. `gated_cnn` is the block of "
        "Mamba without its scan (MambaOut): what it reaches was not owed to a state space.",
    ),
    Family(
        "Wrappers and hybrids",
        "bidirectional parallel* stack* shared* hymba* griffin* samba* jamba* zamba*",
        ("that of its mixer", "those of its mixers"),
        "Mixers made of mixers: any causal one in both directions, several side by side on one "
        "input (Hymba), or several layers one behind the other by a pattern string (Samba, Jamba, "
        "Griffin), with feed-forward layers or a mixture of experts between. What they take is in "
        "their docstrings.",
    ),
)

WHICH = """\
- **Images and graphs, where all tokens are there at once:** `hydra` or `bimamba`, which read both
  ways in one call. A causal mixer works too: images are then read in turns from layer to layer,
  and graphs by two mixers.
- **Graphs of many sizes in one batch:** any mixer packs them. Those on scans keep the cost of
  padding at nothing; `hyena` and `attention` gather the sequences into a padded batch inside. If
  the order of nodes means nothing, `linear_attention_bidirectional` and `attention_bidirectional`
  do not depend on it.
- **Agents that act step by step:** any recurrent mixer. `mamba` is the published one; `lru`, `s5`
  and `rg_lru` carry little, `mamba2` and `mamba3` much (the last table has the bytes).
  `attention` needs its window read again in every step.
- **Long sequences on a GPU:** matrix states (`mamba2`, `rwkv6`, `retnet`), which are matrix
  products; `mamba` where many small states serve better than few large ones.
- **A few hundred tokens on a GPU:** in speed only short convolutions are level with attention; what
  a state space brings there is what it learns and carries. In packed batches of graphs many are
  ahead of it, `gla`, `phi_mamba` and `s5` first (the last table).
- **Signals that are sampled evenly:** time-invariant state spaces; `s5` and `lru`, with one system
  for all channels, cost far less on a CPU than those with one a channel.
- **Looking things up that were read once, far back:** attention, at least in some layers: a hybrid
  by `stack` or `parallel`. A state of fixed size forgets.
- **Before any of that:** run `gated_cnn` (or `gated_cnn_bidirectional`) and `attention`. If they
  are as good on your data, a state space is not what it needs."""
