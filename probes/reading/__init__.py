"""Which residual memories does a network have? One forward's dataflow -> a `NetworkReading`.

A network is branches that read from and write to a linear memory. One way for all of them: record the forward (`recorder`,
`graph`), follow what is carried from a first value (`operations`, `carrying`, `numbers`, `memory`, `roots`, `choice`), find
what is written and from what it was computed (`branches`), what is alive between a write and the next read (`cuts`), what
joins these states by replays on unit streams (`replays`, `states`, `connections`), prove it (`proof`), name it (`names`).

The contract is `description.NetworkReading`: memories by name, the model's first; each has states (layer, site, places,
values as tokens × streams × features), connections (h_res, branches with h_pre, h_post and gates, or reads over depth), and
a proof line: `proven`, or `unproven: why`. A `ValuePlace` (module, call, operation, k-th of its name, result) is where a
later forward makes a value again. What has no memory is refused with the reason; nothing is guessed.
"""
