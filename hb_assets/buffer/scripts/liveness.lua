#!lua flags=no-writes
-- All liveness timestamps and counts of work at one instant.
-- KEYS: timestamps, counts.  Returns {this server's clock (epoch ms), fields and values of each key}.
local time = redis.call('TIME')
return {time[1] * 1000 + math.floor(time[2] / 1000), redis.call('HGETALL', KEYS[1]),
    redis.call('HGETALL', KEYS[2])}
