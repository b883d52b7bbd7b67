#!lua flags=allow-oom
-- Hand to one consumer whatever has been pending too long, whoever had it.
-- KEYS: stream.  ARGV: group, heir, least idle milliseconds.
-- Returns {entries that are the heir's now, pending entries that were deleted: lost}.
local moved, lost, cursor = 0, 0, '0-0'
repeat
    local page = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], cursor,
        'COUNT', 1000, 'JUSTID')
    cursor, moved, lost = page[1], moved + #page[2], lost + #page[3]
until cursor == '0-0'
return {moved, lost}
