#!lua flags=allow-oom
-- A write that changes nothing, so that WAITAOF behind it has something to confirm. Has to work when
-- Redis is full: a gateway that starts then has to refuse heartbeats, not to stay away.
-- KEYS: ledger.
redis.call('HINCRBY', KEYS[1], 'appended', 0)
return 1
