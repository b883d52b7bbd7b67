#!lua flags=no-writes
-- All signs of life and counts at one instant.
-- KEYS: beats, counts.  Returns {this server's clock (epoch ms), fields and values of the beats, of the counts}.
local time = redis.call('TIME')
return {time[1] * 1000 + math.floor(time[2] / 1000), redis.call('HGETALL', KEYS[1]),
    redis.call('HGETALL', KEYS[2])}
