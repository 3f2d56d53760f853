-- Take, or renew, the lease of a partition.
--
-- KEYS  1 lease (string "holder epoch")   2 epoch (counter)
-- ARGV  1 holder   2 time to live in ms   3 the epoch held ("0" to take afresh)
-- Answer  {epoch, 1} when ARGV[1] holds the lease now, {epoch, 0, holder} when another does
local current = redis.call('GET', KEYS[1])
if current then
  local holder, epoch = string.match(current, '^(.*) (%d+)$')
  if holder ~= ARGV[1] then return {tonumber(epoch), 0, holder} end
  if epoch == ARGV[3] then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return {tonumber(epoch), 1}
  end
end
local epoch = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. epoch, 'PX', ARGV[2])
return {epoch, 1}
