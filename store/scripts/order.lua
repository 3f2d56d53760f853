-- A worker's writes to one partition, under its epoch: events, and the orders they announce.
-- An order is sent if and only if its cleanup_requested is in the log.
--
-- KEYS  1 lease   2 log   3 seqs   4.. order streams (one per process that gets orders)
-- ARGV  1 "holder epoch"   2 writer   3 seq of the first event   4 number of events
--       5.. events, then for each order: index into KEYS, payload
-- Answer  last seq of the writer
-- Errors  FENCED   the lease is not held under this epoch any more; nothing is written
--         SEQGAP <expected>
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end
local last = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or '0')
local first, count = tonumber(ARGV[3]), tonumber(ARGV[4])
if first > last + 1 then return redis.error_reply('SEQGAP ' .. (last + 1)) end
if count > 0 and first + count - 1 <= last then return last end
for i = 5, count + 4 do
  redis.call('XADD', KEYS[2], '*', 'e', ARGV[i])
end
if count > 0 then
  last = first + count - 1
  redis.call('HSET', KEYS[3], ARGV[2], last)
end
for i = count + 5, #ARGV, 2 do
  local key = KEYS[tonumber(ARGV[i])]
  redis.call('XADD', key, 'MAXLEN', '~', 10000, '*', 'o', ARGV[i + 1])
  redis.call('PEXPIRE', key, 86400000)
end
return last
