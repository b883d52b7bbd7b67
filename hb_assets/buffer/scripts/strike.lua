#!lua flags=allow-oom
-- Strike pending entries off that aren't in the stream any more: somebody deleted them, they are lost.
-- KEYS: stream, ledger.  ARGV: group, ids.
-- Returns how many were pending: lost.
local lost = 0
for i = 2, #ARGV do
    lost = lost + redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
end
if lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', lost) end
return lost
