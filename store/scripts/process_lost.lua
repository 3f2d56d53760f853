-- Close a process whose lease has lapsed: fence it, and say so in the log, under the worker's epoch.
--
-- KEYS  1 lease   2 log   3 seqs   4 hosts   5 inventory of the process   6 orders of the process
-- ARGV  1 "holder epoch"   2 writer   3 seq of the event   4 the event   5 the lost process
-- Answer  1 written, 0 the process has renewed its lease meanwhile, or is closed already
-- Errors  FENCED, SEQGAP <expected>
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end
local last = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or '0')
-- Sent again by a client that lost the reply: this very event is in the log.
if redis.call('HGET', KEYS[3], ARGV[5]) == 'lost' and tonumber(ARGV[3]) <= last then return 1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lapses = redis.call('ZSCORE', KEYS[4], ARGV[5])
if not lapses or tonumber(lapses) > now then return 0 end
if tonumber(ARGV[3]) ~= last + 1 then return redis.error_reply('SEQGAP ' .. (last + 1)) end
redis.call('XADD', KEYS[2], '*', 'e', ARGV[4])
redis.call('HSET', KEYS[3], ARGV[2], last + 1, ARGV[5], 'lost')
redis.call('ZREM', KEYS[4], ARGV[5])
redis.call('DEL', KEYS[5], KEYS[6])
return 1
