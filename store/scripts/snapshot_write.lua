-- Keep a snapshot of a partition, under the epoch of its lease; of the older ones the last few stay.
--
-- KEYS  1 lease   2 snapshots (hash: entry id -> snapshot)
-- ARGV  1 "holder epoch"   2 id of the last entry folded   3 the snapshot   4 how many are kept
-- Answer  how many there are now
-- Errors  FENCED   the lease is not held under this epoch any more; nothing is written
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
local ids = redis.call('HKEYS', KEYS[2])
local function parts(id)
  local ms, n = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms) or 0, tonumber(n) or 0
end
table.sort(ids, function(a, b)
  local a_ms, a_n = parts(a)
  local b_ms, b_n = parts(b)
  if a_ms ~= b_ms then return a_ms < b_ms end
  return a_n < b_n
end)
for i = 1, #ids - tonumber(ARGV[4]) do redis.call('HDEL', KEYS[2], ids[i]) end
return math.min(#ids, tonumber(ARGV[4]))
