#!lua flags=allow-oom
-- Hand to one consumer whatever has been pending too long, whoever had it.
-- KEYS: stream, ledger.  ARGV: group, heir, least idle milliseconds.
-- Returns {entries that are the heir's now, pending entries that were deleted: lost}.
local moved, lost, cursor = 0, 0, '0-0'
repeat
    local page = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], cursor,
        'COUNT', 1000, 'JUSTID')
    cursor, moved, lost = page[1], moved + #page[2], lost + #page[3]
until cursor == '0-0'
if lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', lost) end
return {moved, lost}
