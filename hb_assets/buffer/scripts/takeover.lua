#!lua flags=allow-oom
-- Hand what a dead consumer left pending to another one, and forget the dead one.
-- KEYS: stream, ledger.  ARGV: group, dead consumer, heir.
-- Returns {entries that are the heir's now, pending entries that were deleted: lost}.
local moved, lost = 0, 0
while true do
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 500, ARGV[2])
    if #pending == 0 then break end
    local claim = {'XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0}
    for _, entry in ipairs(pending) do claim[#claim + 1] = entry[1] end
    claim[#claim + 1] = 'JUSTID'
    local claimed = #redis.call(unpack(claim))
    moved, lost = moved + claimed, lost + #pending - claimed
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
if lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', lost) end
return {moved, lost}
