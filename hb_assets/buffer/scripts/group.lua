#!lua flags=allow-oom
-- Create the consumer group (and the stream) unless it is there: BUSYGROUP. XGROUP alone is refused when
-- Redis is full, even where there is nothing to create: nobody could drain it any more.
-- KEYS: stream.  ARGV: group.
return redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
