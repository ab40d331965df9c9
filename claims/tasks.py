"""The real tasks that several measurements share, folders of `POLYTASK_DATA/tasks`."""

# Two of intents, four of sentences, two of tags.
EIGHT = (
    "banking77_intent",
    "clinc150_intent",
    "scicite",
    "cr_polarity",
    "hate_offensive",
    "csabstruct",
    "snips_slots",
    "btc_ner",
)
