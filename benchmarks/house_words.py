"""Words that only this library used; `docs/log.md` says how they were found and which word of the field replaces each.

The public ones (`anchors`, `asked`, `learned`, the arms of an evaluation) stay and are not listed. Both tables give the
words by the modules in which they are private, as a pattern of dotted names.
"""

PARTS = {
    r".*": """
        elect elected election ballot candidates voter voters tally lends fade reaches unrotated told born died
        stretch stretches cascade cascades undo normalise thinned
        sheet sheets amounts asking retention resident replacing probed peers
    """,
    r"(anchors|cache|attention|attachment)(\..*)?": "ahead behind near far vote votes site sites",
    r"(cli\.)?evaluation(\..*)?": "hay sight",
}
"""Words that are private also as a part of a name, `ballot` in `empty_ballot`."""

NAMES = {
    r".*": """
        LaterStore ExactStore Extra Plan Lookup View Step Seen side lives compares gain far_queries bounding
        fold keep_BTH add_answer pieces feed looks rests watching way
        of much found held made kept given place places
    """,
    r"(anchors|cache|attention|attachment)(\..*)?": "choice before",
    r"attention(\..*)?": "plan lookup",
    r"memories(\..*)?": "keep write read_out",
    r"(cli\.)?evaluation(\..*)?": "ask asks wanted figures",
    r"training(\..*)?": "cut draws start later sight",
    r"(cli|speed)(\..*)?": "say writing turns show",
}
"""Words that are private as a whole name: the parts of a name such as `tokens_kept` may say something else."""
